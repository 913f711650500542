"""TIP-X, SuS-X and learned prompts: the naive loops, the limits they must have, nothing learned but the vectors."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from clipkit.errors import UserError
from clipkit.evaluation import probe, prompts
from clipkit.evaluation.probe import Set
from clipkit.model.load import build, save
from tests.evaluation.test_probe import clouds, folders  # noqa: F401
from tests.model.tiny import tiny
from tests.typed import well, wrong

CLASSES = ["red cube", "dog", "small green ball"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    return build(tiny()).eval()


def cosine(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b))


def softmax(values: list[float]) -> list[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def test_tip_x_is_its_equations():
    train, validation, test = clouds(9, spread=0.8), clouds(12, seed=5), clouds(30, seed=4)
    texts = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), dim=-1)
    found = probe.tip_x(train, validation, test, texts)
    alpha, beta, gamma = (found.settings[name] for name in ("alpha", "beta", "gamma"))
    assert probe.tip_x(train, validation, Set(test.x[:1], test.y[:1]), texts).predicted == found.predicted[0]
    gamma_matters = probe.tip_x(train, validation, test, texts)
    assert gamma_matters.settings == found.settings
    words = texts.tolist()

    def classes_of(x: list[float]) -> list[float]:
        return softmax([cosine(x, text) / 0.5 for text in words])

    def unlike(x: list[float], key: list[float]) -> float:
        return sum(p * math.log(p / q) for p, q in zip(classes_of(x), classes_of(key)))

    keys = train.x.tolist()
    near = [math.exp(-beta * (1 - cosine(x, key))) for x in validation.x.tolist() for key in keys]
    far = [-unlike(x, key) for x in validation.x.tolist() for key in keys]
    for n, x in enumerate(test.x.tolist()):
        logits = [100 * cosine(x, text) for text in words]
        for key, label in zip(keys, train.y.tolist()):
            phi = (-unlike(x, key) - min(far)) / (max(far) - min(far)) * (max(near) - min(near)) + min(near)
            logits[label] += alpha * math.exp(-beta * (1 - cosine(x, key))) + gamma * phi
        assert int(np.argmax(logits)) == found.predicted[n]


def test_tip_x_uses_its_third_part_where_it_helps(monkeypatch):
    """With weight on the third part alone a picture gets the class of those with a class distribution like its own."""
    monkeypatch.setattr(probe, "ALPHAS", (0.0,))
    monkeypatch.setattr(probe, "GAMMAS", (1e4,))
    texts = normalize(torch.eye(3, 6) + 0.1, dim=-1)
    centres = normalize(torch.tensor([[0.9, 0.1, 0, 1, 0, 0], [0.1, 0.9, 0, 0, 1, 0], [0.0, 0, 0.9, 0, 0, 1]]), dim=-1)
    turned = Set(centres, torch.tensor([1, 2, 0]))  # the texts say 0, 1, 2; the memory says otherwise
    found = probe.tip_x(turned, turned, turned, texts)
    assert found.predicted.tolist() == [1, 2, 0] and found.settings["gamma"] == 1e4


def test_support_is_the_nearest_of_the_pool():
    pool = clouds(40, seed=9).x
    texts = normalize(torch.randn(3, 6, generator=torch.Generator().manual_seed(3)), dim=-1)
    chosen = probe.support(pool, texts, 4)
    assert chosen.y.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for c, text in enumerate(texts):
        best = sorted(range(40), key=lambda n: -float(pool[n] @ text))[:4]
        assert torch.equal(chosen.x[4 * c : 4 * c + 4], pool[best])
    with pytest.raises(UserError, match="--shots 41: --support holds only 40 pictures"):
        probe.support(pool, texts, 41)


def test_vectors_that_are_words_give_their_text(model):
    """With the embeddings of "a photo of a" in their places, the texts are the model's own of "a photo of a NAME."."""
    texts = prompts.Prompts(model, CLASSES, 4).texts(prompts._start_words(model))
    own = model.embed_texts([f"a photo of a {name}." for name in CLASSES])
    torch.testing.assert_close(texts, own)


def pictures(model, n: int = 24, noise: float = 0.6, seed: int = 0) -> Set:
    """Embeddings around a direction a class that has nothing to do with the class's own text."""
    centres = normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(2)), dim=-1)
    y = torch.arange(n) % 3
    far = torch.randn(n, 16, generator=torch.Generator().manual_seed(seed))
    return Set(normalize(centres[y] + noise * far / 4, dim=-1), y)


def test_learning_moves_the_vectors_alone_and_helps(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    train, validation, test = (pictures(model, seed=seed) for seed in range(3))
    losses: list[float] = []
    found = prompts.coop(
        model, train, validation, test, CLASSES, vectors=4, epochs=30, lr=0.1, watch=lambda _, loss: losses.append(loss)
    )
    assert losses[-1] < 0.6 * losses[0]
    own = probe.zero_shot(validation, test, model.embed_texts([f"a photo of a {name}." for name in CLASSES]))
    assert (found.predicted == test.y).sum() > (own.predicted == test.y).sum()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters()) and not model.training
    again = prompts.coop(model, train, validation, test, CLASSES, vectors=4, epochs=30, lr=0.1)
    assert torch.equal(again.predicted, found.predicted)


def test_a_step_is_the_gradient_of_the_written_loss(model):
    """One step of KgCoOp by hand: the texts from words and vectors, cross-entropy, the distance from the hand-made."""
    train = pictures(model, 6)
    near = model.embed_texts(CLASSES)
    start = prompts._start_words(model)
    learned = prompts.Prompts(model, CLASSES, 4).fit(train, start, hand_made=near, keep=8.0, epochs=1)
    vectors = start.clone().requires_grad_()
    tower, rows = model.text_tower, model.tokenizer([f"{name}." for name in CLASSES])
    total = torch.zeros(())
    loss = torch.zeros(())
    texts = []
    for c, row in enumerate(rows):
        ids = [int(i) for i in row if i]
        words = tower.token_embedding(torch.tensor(ids)).detach()
        x = torch.cat([words[:1], vectors, words[1:]])[None] + tower.positional_embedding[: len(ids) + 4].detach()
        x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask))[0, -1] @ tower.text_projection
        texts.append(normalize(x, dim=-1))
        loss = loss + 8.0 * (1 - texts[-1] @ near[c]) / len(CLASSES)
    for x, y in zip(train.x, train.y):
        logits = torch.stack([model.scale.detach()[0] * x @ text for text in texts])
        total = total + cross_entropy(logits[None], y[None]) / len(train.y)
    (slope,) = torch.autograd.grad(total + loss, vectors)
    step = 1e-5 * (slope + 5e-4 * start)
    torch.testing.assert_close(learned, start - step, rtol=0, atol=1e-8)


def test_a_heavy_weight_keeps_the_hand_made_texts(model):
    train, validation, test = (pictures(model, seed=seed) for seed in range(3))
    near = model.embed_texts([f"a photo of a {name}." for name in CLASSES])
    made = prompts.Prompts(model, CLASSES, 4)
    start = prompts._start_words(model)

    def drift(keep: float) -> float:
        learned = made.fit(train, start, hand_made=near, keep=keep, epochs=20, lr=2e-3)
        return float((1 - (made.texts(learned) * near).sum(1)).mean())

    assert drift(500.0) < drift(8.0) < drift(0.0)
    found = prompts.kgcoop(model, train, validation, test, CLASSES, near, epochs=2)
    assert found.settings == {"vectors": 4, "keep": 8.0}


def test_what_cannot_be_learned_through(model):
    with pytest.raises(UserError, match="30 learned vectors and the class name 'small green ball' do not fit"):
        prompts.Prompts(model, CLASSES, 30)
    model.text_tower.pool_type = "last"
    with pytest.raises(UserError, match="need a causal text transformer"):
        prompts.Prompts(model, CLASSES, 2)
    with pytest.raises(UserError, match="list has no place"):
        prompts.Prompts([], CLASSES, 2)


def test_the_command_takes_methods(folders: Path):  # noqa: F811
    torch.manual_seed(0)
    save(build(tiny()).eval(), folders / "model")
    words = ["probe", folders / "model", "--train", folders / "train", "--test", folders / "test"]
    few = [*words, "--shots", "2", "--epochs", "2", "--vectors", "3"]
    said = well(*few, "--method", "tip-x,sus-x,coop,kgcoop", "--support", folders / "train" / "cat")
    names = [line.split("\t")[0] for line in said.splitlines()]
    assert names == ["method", "zero-shot", "TIP-X", "SuS-X", "CoOp", "KgCoOp"]
    assert "vectors 3" in said and "keep 8" in said
    assert "no such method; did you mean coop" in wrong(*few, "--method", "cop")
    assert "belong together" in wrong(*few, "--method", "sus-x")
    assert "belong together" in wrong(*few, "--support", folders)
    assert "give --shots" in wrong(*words, "--method", "sus-x", "--support", folders)
