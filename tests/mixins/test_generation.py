"""Every way to generate, as transformers' GenerationTesterMixin goes through them, beside stock."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    StaticCache,
    StoppingCriteria,
    StoppingCriteriaList,
    pipeline,
)

from tests.helpers.tiny import tiny_model, tiny_tokenizer
from tests.mixins.setting import (
    ARCHITECTURES,
    WAYS,
    Check,
    assert_gives,
    offloaded,
    padded,
    stock,
    token_ids,
)

EVERYTHING = {
    "return_dict_in_generate": True,
    "output_scores": True,
    "output_logits": True,
    "output_hidden_states": True,
    "output_attentions": True,
}


def generate(model: Any, **options: Any) -> Any:
    """Eight tokens after three padded prompts, seeded."""
    inputs = {} if "inputs_embeds" in options or "input_ids" in options else padded()
    torch.manual_seed(5)
    return model.generate(**inputs, **({"max_new_tokens": 8, "do_sample": False} | options))


def plain(output: Any) -> Any:
    """A generation's output without its key/value cache."""
    return {name: value for name, value in output.items() if name != "past_key_values"}


def ways(**options: dict[str, Any]) -> dict[str, Check]:
    return {name.replace("_", " "): partial(generate, **chosen) for name, chosen in options.items()}


SAMPLED = {"do_sample": True, "temperature": 1.2}
OPTIONS = ways(
    greedy={},
    one_token={"max_new_tokens": 1},
    length_instead_of_new_tokens={"max_new_tokens": None, "max_length": 17},
    sampling=SAMPLED,
    top_k=SAMPLED | {"top_k": 5},
    top_p=SAMPLED | {"top_p": 0.7},
    min_p=SAMPLED | {"min_p": 0.02},
    typical=SAMPLED | {"typical_p": 0.8},
    epsilon_cutoff=SAMPLED | {"epsilon_cutoff": 1e-3},
    eta_cutoff=SAMPLED | {"eta_cutoff": 1e-3},
    several_sequences=SAMPLED | {"num_return_sequences": 3},
    beams={"num_beams": 3},
    beams_that_stop_early={"num_beams": 3, "early_stopping": True},
    sampled_beams={"num_beams": 2, "do_sample": True},
    several_beams={"num_beams": 4, "num_return_sequences": 2},
    length_penalty={"num_beams": 3, "length_penalty": 0.2},
    no_cache={"use_cache": False},
    static_cache={"cache_implementation": "static"},
    prompt_in_chunks={"prefill_chunk_size": 4},
    repetition_penalty={"repetition_penalty": 1.5},
    no_repeated_ngrams={"no_repeat_ngram_size": 2},
    bad_words={"bad_words_ids": [[5], [7, 8]]},
    minimum_length={"min_new_tokens": 6, "eos_token_id": [3, 9, 40, 60]},
    several_end_tokens={"eos_token_id": list(range(60, 120))},
    forced_end={"forced_eos_token_id": 1},
    suppressed_tokens={"suppress_tokens": list(range(100, 200))},
    length_decay={"exponential_decay_length_penalty": (2, 1.5)},
    sequence_bias={"sequence_bias": [[[9], 5.0]]},
    guidance={"guidance_scale": 1.5},
    renormalised=SAMPLED | {"renormalize_logits": True, "top_k": 5},
    remove_invalid_values={"remove_invalid_values": True},
)


def everything(model: Any, **options: Any) -> Any:
    model.set_attn_implementation("eager")
    return plain(generate(model, **EVERYTHING, **options))


def transition_scores(model: Any) -> Any:
    output = generate(model, num_beams=2, return_dict_in_generate=True, output_scores=True)
    return model.compute_transition_scores(output.sequences, output.scores, output.beam_indices)


def assisted(model: Any) -> Tensor:
    assistant: Any = tiny_model("olmoe", 1)
    return model.generate(
        token_ids(1), assistant_model=assistant, max_new_tokens=12, do_sample=False
    )


def assisting(model: Any) -> Tensor:
    """The model drafts for another one."""
    other: Any = tiny_model("olmoe", 1)
    return other.generate(token_ids(1), assistant_model=model, max_new_tokens=12, do_sample=False)


def prompt_lookup(model: Any) -> Tensor:
    ids_1T = token_ids(1).repeat(1, 2)
    return model.generate(ids_1T, prompt_lookup_num_tokens=3, max_new_tokens=12, do_sample=False)


def early_exit(model: Any) -> Tensor:
    return model.generate(token_ids(1), assistant_early_exit=2, max_new_tokens=8, do_sample=False)


def from_embeddings(model: Any) -> Tensor:
    inputs = padded()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return generate(model, inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])


def embeddings_and_ids(model: Any) -> Tensor:
    inputs = padded()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    return generate(model, inputs_embeds=embeddings, **inputs)


def without_a_prompt(model: Any) -> Tensor:
    torch.manual_seed(5)
    return model.generate(bos_token_id=2, max_new_tokens=8, do_sample=False)


def continued(model: Any) -> Any:
    """A generation goes on from the key/value cache of one before it."""
    first = generate(model, return_dict_in_generate=True, max_new_tokens=4)
    mask = torch.cat([padded()["attention_mask"], torch.ones(3, 4, dtype=torch.int64)], 1)
    return generate(
        model, input_ids=first.sequences, attention_mask=mask,
        past_key_values=first.past_key_values,
    )  # fmt: skip


def own_cache(model: Any) -> Any:
    cache = DynamicCache(config=model.config)
    tokens = generate(model, past_key_values=cache)
    return tokens, cache.get_seq_length()


def own_static_cache(model: Any) -> Any:
    cache = StaticCache(config=model.config, max_cache_len=32)
    return generate(model, past_key_values=cache)


class _Odd(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 0, float("-inf"))


class _AfterFour(StoppingCriteria):
    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 16)


def own_processors(model: Any) -> Tensor:
    return generate(
        model,
        logits_processor=LogitsProcessorList([_Odd()]),
        stopping_criteria=StoppingCriteriaList([_AfterFour()]),
    )


def stop_strings(model: Any) -> Tensor:
    return generate(model, stop_strings=["a", "e", "qu"], tokenizer=tiny_tokenizer())


def allowed_tokens(model: Any) -> Tensor:
    return generate(model, prefix_allowed_tokens_fn=lambda _, ids: [int(ids[-1]) // 2 + 2, 5])


def own_loop(model: Any) -> Tensor:
    """`custom_generate`: a decoding loop of the caller's own."""

    def loop(model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
        for _ in range(4):
            last = model(input_ids).logits[:, -1]
            input_ids = torch.cat([input_ids, last.argmax(-1, keepdim=True)], 1)
        return input_ids

    return model.generate(token_ids(), custom_generate=loop)


def two_at_a_time(model: Any) -> Any:
    """Steps of two sequences in turn, each with a key/value cache of its own."""
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    tokens = [token_ids(1, 6, seed) for seed in (1, 2)]
    steps = [ids.clone() for ids in tokens]
    with torch.no_grad():
        for _ in range(5):
            for place, cache in enumerate(caches):
                last = model(steps[place], past_key_values=cache, use_cache=True).logits[:, -1]
                steps[place] = last.argmax(-1, keepdim=True)
                tokens[place] = torch.cat([tokens[place], steps[place]], 1)
    return tokens


def text_pipeline(model: Any) -> Any:
    pipe = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    return pipe(["the old", "a town by the sea"], max_new_tokens=6, do_sample=False, batch_size=2)


def batched_continuously(model: Any) -> Any:
    """Transformers' own continuous batching."""
    prompts = [ids.tolist() for ids in token_ids(3)]
    from transformers import ContinuousBatchingConfig, GenerationConfig

    config = GenerationConfig(max_new_tokens=5, do_sample=False, eos_token_id=1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=16, num_blocks=16, max_batch_tokens=64)
    outputs = model.generate_batch(
        inputs=prompts, generation_config=config, continuous_batching_config=small
    )
    return sorted(output.generated_tokens for output in outputs.values())


CHECKS: dict[str, Check] = OPTIONS | {
    "all outputs": everything,
    "all outputs, sampling": lambda model: everything(model, **SAMPLED),
    "all outputs of beams": lambda model: everything(model, num_beams=2),
    "all outputs without a cache": lambda model: everything(model, use_cache=False),
    "transition scores": transition_scores,
    "assisted": assisted,
    "as the assistant": assisting,
    "prompt lookup": prompt_lookup,
    "early exit": early_exit,
    "from embeddings": from_embeddings,
    "embeddings and ids": embeddings_and_ids,
    "without a prompt": without_a_prompt,
    "continued from a cache": continued,
    "a cache of the caller's": own_cache,
    "a static cache of the caller's": own_static_cache,
    "own processors": own_processors,
    "stop strings": stop_strings,
    "allowed tokens": allowed_tokens,
    "own loop": own_loop,
    "two at a time": two_at_a_time,
    "text pipeline": text_pipeline,
    "continuous batching": batched_continuously,
}


ONCE = "continuous batching"
"""The slowest, so it runs with one architecture, loaded in one way."""
CASES = [
    (name, architecture, way)
    for name, architecture, way in product(CHECKS, ARCHITECTURES, WAYS)
    if name != ONCE or (architecture, way) == (next(iter(ARCHITECTURES)), next(iter(WAYS)))
]


@pytest.mark.parametrize(("name", "architecture", "way"), CASES)
def test_generation_is_the_stock_models(name: str, architecture: str, way: str) -> None:
    check = CHECKS[name]
    try:
        expected = check(stock(architecture))
    except Exception as error:  # the stock model cannot do it: nor need the offloaded one
        with pytest.raises(type(error)):
            check(offloaded(architecture, way))
        pytest.skip(f"the stock model raises {type(error).__name__}: {error}"[:120])
    assert_gives(check, architecture, way, expected)
