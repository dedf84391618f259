"""Many requests at once: continuous batching over one offloaded model.

request         a request and its result; settings: how requests run together
serve           `engine.serve`: requests in, results out; async_server: the same for asyncio
serving_loop    one step after the other; steps/: the parts of it
sequence        a request in flight; detokenizer: its text
validation      prompts as token ids, checked; chat: prompts out of conversations
model_runner    a step's parts run through the model
model_settings  settings of commands that serve a model
inputs/         a request's fields and prompt in one form; sampling/: its next token
scheduling/     who is admitted and who decodes
batch/          a whole data set
"""
