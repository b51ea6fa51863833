"""Pictures of methods that add small networks to blocks, or train whole blocks."""

from collections.abc import Sequence

from .picture import Kind, Picture


def bottleneck() -> Picture:
    """Return a block with an adapter behind each half, and what an adapter is made of."""
    picture = Picture("Bottleneck adapters (Houlsby)", "y + W_up φ(W_down y)")
    picture.text(20, 106, "x", 18, bold=True)
    picture.arrow((28, 100), (44, 100))
    for left, name in ((44, "attention"), (300, "feed-forward")):
        picture.box(left, 74, 104, 52, name)
        picture.arrow((left + 104, 100), (left + 122, 100))
        picture.box(left + 122, 74, 62, 52, "adapter", kind="trained", size=14)
        picture.box(left + 202, 74, 42, 52, "norm", kind="trained", size=13)
        picture.arrow((left + 184, 100), (left + 202, 100))
    picture.arrow((288, 100), (300, 100))
    picture.line((153, 126), (120, 152), kind="trained")
    picture.line((241, 126), (454, 152), kind="trained")
    picture.text(30, 197, "y", 16, bold=True)
    picture.arrow((40, 192), (84, 192))
    picture.taper(84, 192, 108, 74, 36, "W_down", "m × d")
    picture.arrow((192, 192), (210, 192))
    picture.box(210, 174, 40, 36, "φ", kind="plain")
    picture.arrow((250, 192), (268, 192))
    picture.taper(268, 192, 108, 36, 74, "W_up", "d × m")
    picture.arrow((376, 192), (440, 192))
    picture.sign(454, 192, "+")
    picture.arrow((56, 192), (56, 238), (454, 238), (454, 206))
    picture.arrow((468, 192), (500, 192))
    return picture


def _beside_feed_forward(title: str, formula: str) -> Picture:
    """Return a picture with x -> feed-forward -> + -> y, and room for a branch below it."""
    picture = Picture(title, formula)
    picture.text(26, 141, "x", 18, bold=True)
    picture.line((38, 135), (66, 135))
    picture.arrow((66, 135), (66, 90), (96, 90))
    picture.box(96, 62, 300, 56, "feed-forward block")
    picture.arrow((396, 90), (444, 90), (444, 121))
    picture.sign(444, 135, "+")
    picture.arrow((458, 135), (522, 135))
    picture.text(538, 141, "y", 18, bold=True)
    return picture


def parallel_adapter() -> Picture:
    """Return a feed-forward block with a small network beside it."""
    picture = _beside_feed_forward("Parallel adapter", "FFN(x) + s W_up relu(W_down x)")
    picture.arrow((66, 135), (66, 186), (96, 186))
    picture.taper(96, 186, 112, 78, 38, "W_down", "r × d")
    picture.arrow((208, 186), (226, 186))
    picture.box(226, 168, 48, 36, "relu", kind="plain")
    picture.arrow((274, 186), (292, 186))
    picture.taper(292, 186, 104, 38, 78, "W_up", "d × r")
    picture.arrow((396, 186), (444, 186), (444, 149))
    picture.text(420, 176, "× s", 14)
    return picture


def krona_block() -> Picture:
    """Return a feed-forward block with a Kronecker product beside it."""
    picture = _beside_feed_forward("KronA beside blocks", "FFN(X) + s X (A ⊗ B)")
    picture.arrow((66, 135), (66, 170), (164, 170))
    picture.box(164, 144, 84, 52, "A", "a₁ × a₂", kind="trained")
    picture.text(266, 176, "⊗", 20)
    picture.box(284, 144, 84, 52, "B", "b₁ × b₂", kind="trained")
    picture.arrow((368, 170), (444, 170), (444, 149))
    picture.text(406, 162, "× s", 14)
    picture.line((66, 170), (66, 222), (190, 222), kind="trained")
    picture.text(278, 227, "KronA^B_res: s_res X", 14)
    picture.sign(494, 135, "+")
    picture.arrow((364, 222), (494, 222), (494, 149), kind="trained")
    return picture


def mam() -> Picture:
    """Return prefixes in attention, and a small network beside feed-forward."""
    picture = Picture("MAM adapter", "prefixes, and parallel adapters")
    picture.text(22, 106, "x", 18, bold=True)
    picture.arrow((30, 100), (56, 100))
    picture.box(56, 72, 140, 56, "attention")
    picture.box(56, 168, 62, 50, "P_k", "l × d", kind="trained", size=14)
    picture.box(134, 168, 62, 50, "P_v", "l × d", kind="trained", size=14)
    picture.arrow((87, 168), (87, 128), kind="trained")
    picture.arrow((165, 168), (165, 128), kind="trained")
    picture.arrow((196, 100), (256, 100))
    picture.box(256, 72, 176, 56, "feed-forward block")
    picture.arrow((432, 100), (480, 100))
    picture.sign(494, 100, "+")
    picture.arrow((508, 100), (534, 100))
    picture.arrow((230, 100), (230, 192), (248, 192))
    picture.taper(248, 192, 88, 64, 40, "W_down")
    picture.arrow((336, 192), (354, 192))
    picture.taper(354, 192, 88, 40, 64, "W_up")
    picture.arrow((442, 192), (494, 192), (494, 114))
    picture.text(470, 182, "× s", 14)
    return picture


def _stack(title: str, formula: str, kinds: Sequence[Kind], *note: str) -> Picture:
    """Return embeddings, three blocks and what follows them."""
    picture, left = Picture(title, formula), 16.0
    names = (("embed-", "dings"), ("block 1",), ("…",), ("block N",), ("head",))
    for name, kind, width in zip(names, kinds, (92, 96, 70, 96, 84), strict=True):
        picture.box(left, 88, width, 84, *name, kind=kind)
        if name != ("head",):
            picture.arrow((left + width, 130), (left + width + 22, 130))
        left += width + 22
    for number, line in enumerate(note):
        picture.text(280, 206 + 21 * number, line, 15)
    return picture


def output_layers() -> Picture:
    """Return a model of which what follows the last block trains."""
    kinds: list[Kind] = ["frozen", "frozen", "frozen", "frozen", "trained"]
    note = "what follows the last block: norm, pooler, classifier"
    return _stack("Output layers", "", kinds, note)


def last_layers() -> Picture:
    """Return a model whose last blocks train."""
    kinds: list[Kind] = ["frozen", "frozen", "frozen", "trained", "trained"]
    note = "the last blocks, and what follows them"
    return _stack("Last layers", "", kinds, note)


def full_fine_tuning() -> Picture:
    """Return a model of which everything trains."""
    kinds: list[Kind] = ["trained"] * 5
    note = "every weight, with gradients and optimizer state for each"
    return _stack("Full fine-tuning", "", kinds, note)


def feature_based() -> Picture:
    """Return a model that runs once, and a classifier of its features."""
    picture = Picture("Feature-based", "features once, then any classifier")
    picture.text(26, 141, "x", 18, bold=True)
    picture.arrow((38, 135), (64, 135))
    picture.box(64, 92, 140, 86, "whole model,", "run once")
    picture.arrow((204, 135), (240, 135))
    picture.box(240, 92, 128, 86, "features,", "kept in a file", kind="plain")
    picture.arrow((368, 135), (404, 135))
    picture.box(404, 92, 140, 86, "classifier of", "scikit-learn", kind="trained")
    picture.text(280, 212, "no gradient ever flows through the model", 15)
    return picture
