"""Guards of an offloaded model: a change, a copy or a save of it is exact or refused at the call.

placeholder  a parameter that is listed, but whose values are in no module
contents     the parameters and submodules of experts, which cannot be replaced
guard        the guards of one model, put on it and taken off again
wrappers     the model inside what is passed to `runtime.load`, or a refusal
changes      changes that captured steps would not notice
adapters     adapters beside a model's weights
"""
