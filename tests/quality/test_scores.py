"""Tables of somebody's own scores, and the encoders for their prompts."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from argus.core.errors import BadRequest, ModelError
from argus.quality.encoder import PromptEncoder
from argus.quality.scores import read_scores
from argus.quality.sentences import SentenceEncoder, WordEncoder, load_encoder

ROWS = [
    ("a red fish", 0, 0.9, 0.8), ("a red fish", 1, 0.7, 0.1), ("A  red Fish", 1, 0.0, 0.0),
    ("a boat", 0, 0.8, 0.9), ("a boat", 1, 0.6, 0.6),
]  # fmt: skip
WIDE = pd.DataFrame(ROWS, columns=["prompt", "seed", "large", "small"])


def test_wide_and_long_tables_hold_the_same(tmp_path: Path) -> None:
    WIDE.to_csv(tmp_path / "wide.csv", index=False)
    long = WIDE.melt(["prompt", "seed"], var_name="variant", value_name="score")
    long.to_parquet(tmp_path / "long.parquet")
    wide, same = (read_scores(tmp_path / name) for name in ("wide.csv", "long.parquet"))
    assert wide.prompts == same.prompts == ("a boat", "a red fish")
    assert wide.variants == ("large", "small")  # the best mean first
    np.testing.assert_array_equal(wide.values, same.values)
    np.testing.assert_array_equal(wide.values[1], [[0.9, 0.7], [0.8, 0.1]])  # the first of a seed


def test_quality_is_one_less_what_is_lost_beside_the_exact_picture(tmp_path: Path) -> None:
    WIDE.to_csv(tmp_path / "t.csv", index=False)
    scores = read_scores(tmp_path / "t.csv")
    quality = scores.quality(scores.unit(unrelated=0.25))  # exact's mean is 0.75
    np.testing.assert_allclose(quality[:, 0], 1)
    np.testing.assert_allclose(quality[:, 1], [[1.2, 1.0], [0.8, -0.2]])
    order = scores.ranks().values.ravel().argsort()
    assert (np.diff(scores.values.ravel()[order]) >= 0).all()
    with pytest.raises(BadRequest, match=r"must score less than that, not 0\.9"):
        scores.unit(unrelated=0.9)


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (WIDE.drop(columns="prompt"), "no column `prompt`"),
        (WIDE.drop(columns="small"), "two or more are compared"),
        (WIDE.assign(small="good"), "must hold scores: numbers"),
        (WIDE.assign(small=np.nan), "no prompt and seed with a score of every variant"),
        (WIDE.assign(small=np.inf), "infinite"),
        (WIDE.assign(prompt=None), "no prompt in row 1"),
    ],
)
def test_what_is_no_table_of_scores_is_refused(
    table: pd.DataFrame, message: str, tmp_path: Path
) -> None:
    table.to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(BadRequest, match=message):
        read_scores(tmp_path / "t.csv")


def test_the_exact_variant_can_be_named(tmp_path: Path) -> None:
    WIDE.to_csv(tmp_path / "t.csv", index=False)
    assert read_scores(tmp_path / "t.csv", "small").variants == ("small", "large")
    with pytest.raises(BadRequest, match="it has large, small"):
        read_scores(tmp_path / "t.csv", "tiny")


def test_prompts_of_the_same_words_are_alike_and_a_saved_encoder_says_the_same(
    tmp_path: Path,
) -> None:
    prompts = [f"a {c} {t} {p} the sea" for c in ("red", "blue", "big") for t in ("fish", "boat")
               for p in ("in", "by")]  # fmt: skip
    encoder = WordEncoder.fit(prompts)
    red, near, far = (
        encoder.embed(p).vector for p in ("a red fish", "the red fish", "a blue boat")
    )
    assert red @ near > red @ far + 0.2
    assert np.linalg.norm(red) == pytest.approx(1, abs=1e-5)
    assert not encoder.embed("unheard words").vector.any()
    encoder.save(tmp_path)
    again = load_encoder(str(tmp_path))
    np.testing.assert_array_equal(again.embed("a red fish").vector, red)


@pytest.fixture(scope="module")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sentence-transformers model with random weights."""
    folder = tmp_path_factory.mktemp("bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "fish", "boat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=16).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=16,
        )
    ).save_pretrained(folder)  # fmt: skip
    kinds = ("Transformer", "Pooling", "Normalize")
    described = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (folder / "modules.json").write_text(json.dumps(described))
    (folder / "1_Pooling").mkdir()
    pool(folder, mean=True)
    return folder


def pool(folder: Path, mean: bool) -> None:
    modes = {"pooling_mode_mean_tokens": mean, "pooling_mode_cls_token": not mean}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))


@pytest.mark.parametrize("mean", [True, False])
def test_a_sentence_encoder_pools_as_its_folder_says(tiny_bert: Path, mean: bool) -> None:
    pool(tiny_bert, mean)
    vector = load_encoder(str(tiny_bert)).embed("a red fish").vector
    model = BertModel.from_pretrained(tiny_bert).eval()
    ids = BertTokenizerFast.from_pretrained(tiny_bert)("a red fish", return_tensors="pt")
    with torch.inference_mode():
        states = model(**ids).last_hidden_state[0].numpy()
    expected = states.mean(0) if mean else states[0]
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


def test_a_long_prompt_is_cut_and_said_to_be(tiny_bert: Path) -> None:
    pool(tiny_bert, True)
    encoder = SentenceEncoder.load(str(tiny_bert))
    assert not encoder.embed("a red fish").truncated
    assert encoder.embed("red " * 40).truncated


def test_an_encoder_that_does_more_is_refused(tiny_bert: Path, tmp_path: Path) -> None:
    for file in tiny_bert.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "modules.json").write_text(json.dumps([{"type": "x.Dense"}]))
    with pytest.raises(ModelError, match="a module Dense"):
        load_encoder(str(tmp_path))
    with pytest.raises(ModelError, match="cannot be loaded"):
        load_encoder(str(tmp_path / "nowhere"))


def test_a_pipelines_own_text_encoder_embeds_too(tiny_sd: Path) -> None:
    expected = PromptEncoder.load(tiny_sd).embed("a red fish").vector
    np.testing.assert_array_equal(load_encoder(str(tiny_sd)).embed("a red fish").vector, expected)


def test_seeds_only_say_which_pictures_belong_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """One odd prompt must not make a table of a hundred one of itself."""
    rows = [(f"prompt {i}", f"seed-{i}-{s}", 1.0 + s, 2.0 + i) for i in range(20) for s in range(2)]
    rows += [("prompt 3", "another", 7.0, 8.0), ("a lone one", "x", 1.0, 1.0)]
    file = tmp_path / "scores.csv"
    pd.DataFrame(rows, columns=["prompt", "seed", "20", "50"]).to_csv(file, index=False)
    scores = read_scores(file, "50")
    assert (len(scores.prompts), scores.seeds, scores.variants) == (20, (0, 1), ("50", "20"))
    assert scores.values[scores.prompts.index("prompt 3")].tolist() == [[5.0, 5.0], [1.0, 2.0]]
    assert "1 of 21 prompts" in caplog.text
    long = pd.read_csv(file).melt(["prompt", "seed"], var_name="variant", value_name="score")
    long = long.assign(variant=long["variant"].astype(int))
    long.to_parquet(tmp_path / "long.parquet")
    assert read_scores(tmp_path / "long.parquet", "50").variants == ("50", "20")
