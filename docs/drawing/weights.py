"""Pictures of methods that train an update of weights, or of what weights return."""

from .picture import Kind, Picture


def lora() -> Picture:
    """Return a frozen weight, and A and B beside it."""
    picture = Picture("LoRA", "y = W x + (α/r) B A x")
    _frozen_and_low_rank(picture, "W  (out × in)")
    return picture


def qlora() -> Picture:
    """Return a weight in 4 bits, and A and B beside it."""
    picture = Picture("QLoRA", "y = dequant(W₄) x + (α/r) B A x")
    _frozen_and_low_rank(picture, "W in 4 bits (NF4)", "rebuilt in each call")
    return picture


def _frozen_and_low_rank(picture: Picture, *weight: str) -> None:
    """Add x -> W -> + -> y, and B A beside it."""
    picture.text(30, 141, "x", 18, bold=True)
    picture.line((42, 135), (76, 135))
    picture.arrow((76, 135), (76, 90), (150, 90))
    picture.box(150, 60, 210, 60, *weight)
    picture.arrow((360, 90), (466, 90), (466, 121))
    picture.arrow((76, 135), (76, 190), (130, 190))
    picture.taper(130, 190, 110, 76, 40, "A", "(r × in)")
    picture.arrow((240, 190), (278, 190))
    picture.taper(278, 190, 110, 40, 76, "B", "(out × r)")
    picture.arrow((388, 190), (466, 190), (466, 149))
    picture.text(428, 180, "× α/r", 14)
    picture.text(333, 246, "B starts at 0", 14)
    picture.sign(466, 135, "+")
    picture.arrow((480, 135), (518, 135))
    picture.text(534, 141, "y", 18, bold=True)


def dora() -> Picture:
    """Return a weight and its update, each row made one long, times a trained length."""
    picture = Picture("DoRA", "W′ = m ∘ V / ‖V‖,  V = W + (α/r) B A")
    picture.box(16, 70, 96, 110, "W", "(out × in)")
    picture.text(128, 131, "+", 20)
    picture.box(144, 70, 34, 110, "B", kind="trained")
    picture.box(186, 70, 96, 34, "A  (r × in)", kind="trained")
    picture.text(234, 136, "× α/r", 14)
    picture.text(162, 200, "(out × r)", 14)
    picture.arrow((290, 125), (318, 125))
    picture.box(318, 84, 92, 82, "each row", "of V made", "length 1", kind="plain")
    picture.sign(432, 125, "∘")
    picture.box(456, 70, 34, 110, "m", kind="trained")
    picture.arrow((494, 125), (514, 125))
    picture.text(532, 131, "W′", 18, bold=True)
    picture.text(472, 200, "m  (out): lengths", 14)
    picture.text(316, 228, "direction and length of each row train apart", 14)
    return picture


def adalora() -> Picture:
    """Return a frozen weight and triplets, some of which are switched off."""
    picture = Picture("AdaLoRA", "y = W x + (α/r) P Λ Q x")
    picture.box(16, 70, 100, 120, "W", "(out × in)")
    picture.text(134, 136, "+", 20)
    kinds: tuple[Kind, ...] = ("trained", "trained", "plain", "trained", "plain")
    for i, kind in enumerate(kinds):
        picture.box(154 + 24 * i, 70, 18, 120, kind=kind)
        picture.box(292 + 24 * i, 76 + 24 * i, 18, 18, kind=kind)
        picture.box(428, 72 + 24 * i, 116, 18, kind=kind)
    picture.text(211, 212, "P  (out × r)", 14)
    picture.text(350, 212, "Λ, diagonal", 14)
    picture.text(486, 212, "Q  (r × in)", 14)
    picture.text(350, 60, "white triplets: λ set to 0, since their score is low", 14)
    return picture


def fedpara() -> Picture:
    """Return a frozen weight and the elementwise product of two products."""
    picture = Picture("FedPara (LoHa)", "W′ = W + (X₁ Y₁ᵀ) ∘ (X₂ Y₂ᵀ)")
    picture.box(16, 70, 108, 110, "W", "(out × in)")
    picture.text(142, 131, "+", 20)
    for number, left in (("₁", 162), ("₂", 366)):
        picture.box(left, 70, 34, 110, f"X{number}", kind="trained")
        picture.text(left + 17, 198, "out × R", 13)
        picture.box(left + 42, 70, 110, 34, f"Y{number}ᵀ (R × in)", kind="trained")
        picture.text(left + 97, 134, f"W{number}, rank R", 14)
    picture.sign(340, 125, "∘")
    picture.text(330, 224, "entry by entry, so that the rank reaches R²", 14)
    picture.text(356, 246, "pFedPara: W₂ + 1, which stays with its client", 14)
    return picture


def krona() -> Picture:
    """Return a frozen weight and the blocks of a Kronecker product."""
    picture = Picture("KronA (LoKr)", "Y = X W + s X (A ⊗ B)")
    picture.box(16, 66, 120, 120, "W", "(in × out)")
    picture.text(162, 132, "+ s ·", 16)
    picture.box(188, 96, 60, 60, "A", "a₁ × a₂", kind="trained", size=13)
    picture.text(266, 132, "⊗", 20)
    picture.box(284, 96, 60, 60, "B", "b₁ × b₂", kind="trained", size=13)
    picture.text(364, 132, "=", 20)
    for row in range(3):
        for column in range(3):
            picture.box(
                386 + 52 * column, 54 + 52 * row, 48, 48, f"a{'₁₂₃'[row]}{'₁₂₃'[column]} B", kind="trained", size=13
            )
    picture.text(464, 228, "in = a₁ b₁,  out = a₂ b₂", 14)
    picture.text(266, 212, "B starts at 0", 14)
    return picture


def ia3() -> Picture:
    """Return keys, values and activations, each times a vector."""
    picture = Picture("(IA)³", "l starts at 1")
    picture.text(132, 66, "attention", 15, bold=True)
    for top, name, scale in ((84, "K = W_k x", "l_k"), (140, "V = W_v x", "l_v")):
        picture.box(52, top, 104, 36, name)
        picture.arrow((156, top + 18), (182, top + 18))
        picture.sign(196, top + 18, "∘")
        picture.box(224, top, 44, 36, scale, kind="trained")
        picture.line((224, top + 18), (210, top + 18), kind="trained")
    picture.text(20, 136, "x", 18, bold=True)
    picture.arrow((28, 130), (38, 130), (38, 102), (52, 102))
    picture.arrow((28, 130), (38, 130), (38, 158), (52, 158))
    picture.text(420, 66, "feed-forward", 15, bold=True)
    picture.box(304, 112, 84, 36, "γ(W₁ x)")
    picture.arrow((388, 130), (416, 130))
    picture.sign(430, 130, "∘")
    picture.box(408, 168, 44, 34, "l_ff", kind="trained")
    picture.line((430, 168), (430, 144), kind="trained")
    picture.arrow((444, 130), (470, 130))
    picture.box(470, 112, 64, 36, "W₂")
    picture.text(280, 228, "a number for each feature: l_k (d_k), l_v (d_v), l_ff (d_ff)", 14)
    return picture


def t_few() -> Picture:
    """Return a model with (IA)3 that reads prompts and ranks answers by three losses."""
    picture = Picture("T-Few", "L = L_LM + L_UL + L_LN")
    picture.box(16, 70, 150, 62, "prompt from a", "drawn template", kind="plain")
    picture.box(16, 150, 150, 62, "right answer,", "wrong answers", kind="plain")
    picture.arrow((166, 101), (206, 101))
    picture.arrow((166, 181), (206, 181))
    picture.box(206, 62, 150, 158)
    picture.text(281, 90, "text-to-text", 15)
    picture.text(281, 110, "model", 15)
    picture.box(222, 128, 118, 74, "(IA)³ in", "each block", kind="trained")
    for top, line in ((62, "L_LM: right one"), (117, "L_UL: wrong ones"), (172, "L_LN: ranking")):
        picture.box(392, top, 152, 46, line, kind="plain", size=14)
        picture.arrow((356, top + 23), (392, top + 23))
    return picture


def bitfit() -> Picture:
    """Return a linear layer and a norm whose biases alone train."""
    picture = Picture("BitFit", "y = W x + b")
    for left, name in ((60, "linear layer"), (316, "norm")):
        weight, line = ("W  (out × in)", "W x + b") if left == 60 else ("g  (features)", "g ∘ x̂ + b")
        picture.text(left + 92, 66, name, 15, bold=True)
        picture.box(left, 84, 128, 84, weight)
        picture.text(left + 144, 132, "+", 20)
        picture.box(left + 160, 84, 34, 84, "b", kind="trained")
        picture.text(left + 92, 194, line, 15)
    picture.text(280, 226, "the biases that the base has; no tensor is added", 14)
    return picture
