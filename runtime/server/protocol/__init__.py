"""Requests and answers as OpenAI's API writes them, with the fields that vLLM adds.

fields       what a field may ask for: null is the default, what is not understood is reported, what
             is understood and not supported is refused
sampling     fields that all requests share; completion, chat: those of each kind
tool_choice  tools that a chat may call; tool_calls: calls out of a model's text
answers      what all answers share; completion_answer, chat_answer: those of each kind
logprobs     log-probabilities; token_text: a token's bytes and text
"""
