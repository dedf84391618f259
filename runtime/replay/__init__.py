"""A recorded run as one HTML file: `python -m runtime.replay TRACE --out page.html`.

settings       the options of the command
recording      one document of a trace through two caches, as `simulate` runs them
model_files    the text of its tokens and the bytes of an expert, where the model lies here
page_data      all of it as JSON, numbers packed
bundle         the page: modules, style and data in one file that asks nobody for anything
"""
