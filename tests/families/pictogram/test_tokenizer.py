import pytest
from transformers import CLIPTokenizer

from argus.families.pictogram.tokenizer import learn_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return learn_tokenizer(captions=2000)


def test_frequent_words_are_single_tokens(tokenizer: CLIPTokenizer) -> None:
    assert len(tokenizer("two small striped fish").input_ids) == 4 + 2


@pytest.mark.parametrize("text", ["zebra", "größer", "a 🦓 here", "水", "don't {x}"])
def test_any_text_can_be_spelt(tokenizer: CLIPTokenizer, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[-1] == tokenizer.eos_token_id
    assert ids.count(tokenizer.eos_token_id) == 1


def test_the_end_token_is_not_two(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.eos_token_id not in (None, 2)  # 2 would mean another way of pooling
