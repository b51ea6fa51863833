"""Pictures of methods that train what attention or the input sees beside the tokens."""

from .picture import Kind, Picture


def prefix_tuning() -> Picture:
    """Return attention whose keys and values have trained ones in front, which a perceptron computes."""
    picture = Picture("Prefix tuning", "K′ = [P_k; K],  V′ = [P_v; V]")
    picture.box(16, 64, 76, 60, "E", "l × d", kind="training")
    picture.arrow((92, 94), (112, 94), kind="trained")
    picture.box(112, 64, 106, 60, "perceptron", kind="training")
    picture.line((218, 94), (244, 94), (244, 151), kind="trained")
    _prefixed(picture, 130)
    return picture


def _prefixed(picture: Picture, top: float) -> None:
    """Add rows of keys and values with prefixes, which attention reads."""
    for number, name in enumerate("KV"):
        y = top + 52 * number
        picture.text(216, y + 27, f"{name}′", 16, bold=True)
        picture.box(236, y, 76, 42, f"P_{name.lower()}", kind="trained")
        picture.box(316, y, 116, 42, f"{name} (tokens)")
        picture.arrow((432, y + 21), (460, y + 21))
    picture.box(460, top, 84, 94, "attention")
    picture.text(502, top - 30, "Q of tokens", 14)
    picture.arrow((502, top - 24), (502, top))


def p_tuning_v2() -> Picture:
    """Return blocks with prefixes of their own, and a head."""
    picture = Picture("P-tuning v2", "K′ = [P_k; K],  V′ = [P_v; V]")
    for number, left in enumerate((70, 210, 350)):
        name = ("block 1", "…", "block N")[number]
        picture.box(left, 124, 104, 62, name)
        picture.box(left + 8, 62, 40, 34, "P_k", kind="trained", size=14)
        picture.box(left + 56, 62, 40, 34, "P_v", kind="trained", size=14)
        picture.arrow((left + 28, 96), (left + 28, 124), kind="trained")
        picture.arrow((left + 76, 96), (left + 76, 124), kind="trained")
        picture.arrow((left - 36 if number else 40, 155), (left, 155))
    picture.text(26, 161, "x", 18, bold=True)
    picture.arrow((454, 155), (478, 155))
    picture.box(478, 124, 66, 62, "head", kind="trained")
    picture.text(280, 222, "each attention module has its own prefix, and no perceptron", 14)
    return picture


def llama_adapter() -> Picture:
    """Return attention to tokens and, through a gate, to prompts."""
    picture = Picture("LLaMA-Adapter", "o = W_o (S V + tanh(g) S_p V_p)")
    picture.text(26, 141, "x", 18, bold=True)
    picture.arrow((36, 135), (50, 135), (50, 92), (150, 92))
    picture.text(98, 82, "q, K, V", 14)
    picture.box(150, 64, 176, 56, "softmax over tokens")
    picture.arrow((326, 92), (446, 92), (446, 121))
    picture.box(16, 172, 76, 56, "P", "l × d", kind="trained")
    picture.arrow((92, 200), (150, 200), kind="trained")
    picture.text(121, 190, "K, V", 14)
    picture.box(150, 172, 176, 56, "softmax over prompts")
    picture.arrow((50, 135), (238, 135), (238, 172))
    picture.text(226, 156, "q", 14)
    picture.arrow((326, 200), (344, 200))
    picture.box(344, 178, 76, 44, "tanh(g)", kind="trained")
    picture.arrow((420, 200), (446, 200), (446, 149))
    picture.sign(446, 135, "+")
    picture.arrow((460, 135), (484, 135))
    picture.box(484, 112, 60, 46, "W_o")
    picture.text(382, 244, "g starts at 0", 14)
    return picture


def _tokens(picture: Picture, left: float, top: float, trained: int, words: tuple[str, ...]) -> float:
    """Add trained vectors and words in a row; return where it ends."""
    for number in range(trained):
        picture.box(left, top, 40, 40, f"P{'₁₂₃₄'[number]}", kind="trained")
        left += 44
    for word in words:
        width = 20 + 9 * len(word)
        picture.box(left, top, width, 40, word)
        left += width + 4
    return left


def prompt_tuning() -> Picture:
    """Return trained vectors in front of the embeddings of words."""
    picture = Picture("Prompt tuning", "the model reads [P; x]")
    end = _tokens(picture, 16, 110, 4, ("the", "bus", "is", "late"))
    picture.text(102, 96, "virtual tokens", 14)
    picture.text(282, 96, "embeddings of words", 14)
    picture.text(102, 176, "P  (l × d)", 14)
    picture.arrow((end, 130), (end + 22, 130))
    picture.box(end + 22, 80, 544 - end - 22, 100, "whole", "model")
    return picture


def multitask_prompt_tuning() -> Picture:
    """Return one prompt, scaled for each task by a rank-one matrix."""
    picture = Picture("Multitask prompt tuning", "P_k = P* ∘ (u_k v_kᵀ)")
    picture.box(16, 92, 110, 92, "P*", "l × d", "all tasks", kind="trained")
    picture.sign(152, 138, "∘")
    for number, top in ((1, 62), (2, 148)):
        picture.box(178, top, 30, 72, f"u{'₁₂'[number - 1]}", kind="trained")
        picture.box(214, top, 110, 30, f"v{'₁₂'[number - 1]}", kind="trained")
        picture.text(269, top + 54, f"task {number}", 14)
        picture.arrow((330, top + 38), (350, top + 38))
        picture.box(350, top + 16, 66, 44, f"P{'₁₂'[number - 1]}", kind="plain")
    picture.line((416, 100), (430, 100), (430, 140))
    picture.line((416, 186), (430, 186), (430, 140))
    picture.arrow((430, 140), (446, 140))
    picture.box(446, 84, 98, 108, "model", "reads", "[P_k; x]")
    return picture


def p_tuning() -> Picture:
    """Return pseudo tokens between words, which a small network computes."""
    picture = Picture("P-tuning", "h = MLP(BiLSTM(E))")
    picture.box(16, 60, 80, 56, "E", "n × d", kind="training")
    picture.arrow((96, 88), (120, 88), kind="trained")
    picture.box(120, 60, 96, 56, "LSTM,", "both ways", kind="training")
    picture.arrow((216, 88), (240, 88), kind="trained")
    picture.box(240, 60, 70, 56, "MLP", kind="training")
    picture.line((310, 88), (328, 88), (328, 140), (40, 140), kind="trained")
    left = 16.0
    for word in ("h₁", "h₂", "Paris", "h₃", "h₄", "[MASK]"):
        trained, width = word[0] == "h", 40 if word[0] == "h" else 20 + 9 * len(word)
        picture.box(left, 164, width, 40, word, kind="trained" if trained else "frozen")
        if trained:
            picture.arrow((left + 20, 140), (left + 20, 164), kind="trained")
        left += width + 4
    picture.arrow((left, 184), (left + 24, 184))
    picture.box(left + 24, 150, 544 - left - 24, 68, "whole", "model")
    return picture


def trainable_tokens() -> Picture:
    """Return a table of embeddings of which two rows train."""
    picture = Picture("Trainable tokens", "rows of the input embeddings")
    rows = ("the", "<call>", "bus", "<result>", "late")
    for number, word in enumerate(rows):
        kind: Kind = "trained" if word[0] == "<" else "frozen"
        picture.text(92, 77 + 32 * number, word, 14, "end")
        picture.box(100, 58 + 32 * number, 150, 28, kind=kind)
    picture.text(175, 236, "embeddings", 14)
    picture.arrow((250, 136), (284, 136))
    picture.box(284, 100, 100, 72, "blocks")
    picture.arrow((384, 136), (412, 136))
    picture.box(412, 100, 132, 72, "a tied head has", "the same rows")
    return picture
