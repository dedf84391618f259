"""A data set continued: `python -m runtime.batch`.

survey        the data set, read once before the model is loaded
lengths       lengths of requests, sampled, for the key/value cache
jobs          rows as requests, and their results as lines
openai_lines  the same for lines of OpenAI's batch API
progress      counts while rows are served, and at the end
course        speed, hit rate and bytes over the time of a run, as a picture
batch_run     rows on their way through an engine or several
command       the command
"""
