"""Templates: what they read, where they refuse, and the ids that words get."""

import pytest
from installed import needs

import lightning_peft as lp

pytestmark = needs("transformers")

PSEUDO = -1


def trained_tokenizer(model, pre, post, words, **special):
    """A tokenizer of a real kind, trained on a few words."""
    from tokenizers import Tokenizer, decoders, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(words, trainer)
    if post:
        tokenizer.post_processor = post(tokenizer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module")
def byte_level():
    """As RoBERTa: a space belongs to the word after it, <s> row </s>."""
    from tokenizers import models, pre_tokenizers, processors

    def post(tokenizer):
        return processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[(t, tokenizer.token_to_id(t)) for t in ("<s>", "</s>")]
        )

    special = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>", "unk_token": "<unk>"}
    words = ["Paris lies in France . It is a city ? Question: answer: Rome"] * 9
    return trained_tokenizer(models.BPE(), pre_tokenizers.ByteLevel(add_prefix_space=False), post, words, **special)


@pytest.fixture(scope="module")
def metaspace():
    """As Llama: a space is put before the first word, too; <s> row, no mask."""
    from tokenizers import models, pre_tokenizers, processors

    def post(tokenizer):
        return processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))])

    words = ["Paris lies in France . It is a city ? Question: answer: Rome"] * 9
    special = {"bos_token": "<s>", "unk_token": "<unk>"}
    model = models.BPE(unk_token=special["unk_token"])
    return trained_tokenizer(model, pre_tokenizers.Metaspace(), post, words, **special)


def names(tokenizer, row):
    return ["P" if i == PSEUDO else tokenizer.convert_ids_to_tokens(i) for i in row]


def bare(tokenizer, text):
    return tokenizer(text)["input_ids"]


def test_a_template_knows_its_parts():
    template = lp.Template("[P:3] {subject} is[P] in {mask} . [P:12]{subject}{other}")
    assert (template.pseudo_tokens, template.fields, template.masks) == (16, ["subject", "other"], 1)
    kinds = [piece.kind for piece in template.pieces]
    words = ["pseudo", "words", "field", "words", "pseudo", "words", "field", "words", "pseudo", "field", "field"]
    assert kinds == words


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a [P:0]", r"'\[P:0\]' at character 3 .* no number of pseudo tokens"),
        ("[P:two]", r"'\[P:two\]' at character 1"),
        ("[P:-1] {a}", r"'\[P:-1\]' at character 1"),
        ("[P] {a} [P:3", r"'\[P:' at character 9 .* is not closed"),
        ("{a} }", "'}' at character 5"),
        ("{a", "'{' at character 1"),
        ("so {} it", "'{}' at character 4 .* is no field"),
        ("{two words}", "is no field"),
    ],
)
def test_what_cannot_be_read_is_refused_with_its_place(text, message):
    with pytest.raises(ValueError, match=message):
        lp.Template(text)


ROWS = [
    ("[P:2] {x} lies in [P] {mask} . [P]", "Paris lies in <mask> ."),
    ("{x} [P:3] lies in {mask}", "Paris lies in <mask>"),
    ("[P] {x}[P] ? {mask}[P]", "Paris ? <mask>"),
    ("Question: {x}? [P] answer: {mask}.", "Question: Paris? answer: <mask>."),
]


@pytest.mark.parametrize(("text", "plain"), ROWS)
def test_words_get_the_ids_that_they_have_in_the_row_without_pseudo_tokens(text, plain, byte_level):
    template = lp.Template(text)
    row = template(byte_level, x="Paris")
    assert row.count(PSEUDO) == template.pseudo_tokens
    assert [i for i in row if i != PSEUDO] == bare(byte_level, plain)
    assert row[0] == byte_level.bos_token_id
    assert row[-1] == byte_level.eos_token_id


def test_pseudo_tokens_stand_where_the_template_says(byte_level):
    row = names(byte_level, lp.Template("[P:2] {x} lies [P] in {mask}[P]")(byte_level, x="Paris"))
    assert row == ["<s>", "P", "P", "Paris", "Ġlies", "P", "Ġin", "Ġ", "<mask>", "P", "</s>"]


def test_a_tokenizer_that_begins_rows_with_a_space_begins_no_part_with_one(metaspace):
    row = lp.Template("[P] Question: {x} [P:2] answer: [P] It")(metaspace, x="Rome")
    assert [i for i in row if i != PSEUDO] == bare(metaspace, "Question: Rome answer: It")
    assert names(metaspace, row)[:3] == ["<s>", "P", "▁Question:"]


def test_halves_of_a_word_stand_for_themselves(byte_level):
    row = names(byte_level, lp.Template("Par[P]is")(byte_level))
    before, after = row[1 : row.index("P")], row[row.index("P") + 1 : -1]
    assert ("".join(before), "".join(after)) == ("Par", "is")


def test_a_placeholder_of_the_vocabulary_may_be_chosen(byte_level):
    row = lp.Template("[P:2] {x}", placeholder=7)(byte_level, x="Rome")
    assert row[1:3] == [7, 7]


def test_a_nul_in_a_field_is_no_pseudo_token(byte_level):
    assert lp.Template("[P] {x}")(byte_level, x="Ro\0me").count(PSEUDO) == 1


def test_an_answer_has_the_ids_that_it_has_in_place_of_the_mask(byte_level):
    spaced, first = lp.Template("{x} lies in [P] {mask}"), lp.Template("[P] {mask} is {x}")
    assert names(byte_level, spaced.answer(byte_level, "France")) == ["ĠFrance"]
    assert names(byte_level, first.answer(byte_level, "Paris")) == ["Paris"]
    assert len(spaced.answer(byte_level, "France Rome")) == 2


def test_a_long_field_is_cut_and_never_the_prompt(byte_level):
    text = "[P] {x} answer: {mask} [P]"
    long = "It is a city . " * 30
    row = lp.Template(text, max_length=20, shorten="x")(byte_level, x=long)
    assert len(row) in (19, 20)
    assert "".join(names(byte_level, row)[-9:]).endswith("answer:Ġ<mask>P</s>")
    assert row.count(PSEUDO) == 2
    short = lp.Template(text, max_length=20, shorten="x")(byte_level, x="Rome")
    assert short == lp.Template(text)(byte_level, x="Rome")


def test_rows_that_cannot_be_cut_are_refused(byte_level):
    with pytest.raises(ValueError, match=r"more than max_length=6; name the field to cut by shorten"):
        lp.Template("[P] {x}", max_length=6)(byte_level, x="It is a city " * 3)
    with pytest.raises(ValueError, match="tokens without 'x', more than max_length=3"):
        lp.Template("[P:9] {x}", max_length=3, shorten="x")(byte_level, x="Rome")
    with pytest.raises(ValueError, match=r"shorten='y' is no field .* it has \['x'\]"):
        lp.Template("[P] {x}", shorten="y")


def test_missing_and_unknown_fields_and_masks_are_refused(byte_level, metaspace):
    with pytest.raises(ValueError, match=r"has the fields \['x'\], got \['y'\]"):
        lp.Template("[P] {x}")(byte_level, y="Rome")
    with pytest.raises(ValueError, match="the tokenizer has none"):
        lp.Template("[P] {mask}")(metaspace)
