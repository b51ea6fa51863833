"""Features of frozen models: their values, and that nothing else is computed or changed."""

import feature_models
import pytest
import torch
from feature_models import Collate, bert, sentences
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightning_peft as lp
from lightning_peft.recipes.features import Rows, extract, rows_of
from lightning_peft.recipes.features.pooling import pool
from lightning_peft.tasks import TextClassification


def rows(items=None, side="right", extra=2, split="train", label="labels"):
    return Rows(split, sentences() if items is None else items, Collate(side, extra), label)


def tensors(count=20, *shape):
    x = torch.randn(count, *shape, generator=torch.Generator().manual_seed(5))
    dataset = [(row, number % 2) for number, row in enumerate(x)]
    return x, Rows("train", dataset, torch.utils.data.default_collate, "labels")


def expected(model, items, collate, layer, pooling):
    """Row by row in float64, from transformers' own record of hidden states."""
    found = []
    for item in items:
        batch = collate([item])
        batch.pop("labels")
        with torch.no_grad():
            hidden = model.eval()(**batch, output_hidden_states=True).hidden_states[1:][layer][0]
        attended = hidden[batch["attention_mask"][0].bool()]
        found.append({"cls": attended[0], "last": attended[-1], "mean": attended.sum(0) / len(attended)}[pooling])
    return torch.stack(found)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
@pytest.mark.parametrize("layer", [0, 1, -1])
def test_features_are_pooled_hidden_states_in_the_order_of_the_rows(side, pooling, layer, tmp_path):
    model, data = bert().double(), rows(side=side)
    found = extract(model, [data], tmp_path, layer, pooling, batch_size=4)
    assert found.layer == f"encoder.layer.{layer % 3}"
    values = found.values["train"]
    reference = expected(model, data.dataset, data.collate, layer, pooling)
    assert values.dtype == torch.float64
    # The mean is taken in float32, in which 16-bit features are summed too.
    torch.testing.assert_close(values, reference, atol=1e-6 if pooling == "mean" else 1e-12, rtol=0)
    assert found.labels["train"] == [row["labels"] for row in data.dataset]
    assert (found.computed, found.cached) == (30, 0)  # the last of 31 rows repeats the first


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_reads_no_padding(side):
    hidden, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    mask = mask.flip(1) if side == "left" else mask
    own = [row[kept.bool()] for row, kept in zip(hidden, mask, strict=True)]
    hidden[~mask.bool()] = float("nan")
    assert torch.equal(pool(hidden, mask, "cls"), torch.stack([row[0] for row in own]))
    assert torch.equal(pool(hidden, mask, "last"), torch.stack([row[-1] for row in own]))
    torch.testing.assert_close(pool(hidden, mask, "mean"), torch.stack([row.mean(0) for row in own]))


def test_a_model_gives_the_same_with_a_head_which_runs_once_for_the_key(tmp_path):
    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.head, self.calls = bert(), nn.Linear(16, 2), 0

        def forward(self, **batch):
            hidden = self.base(**batch).pooler_output
            self.calls += 1
            return self.head(hidden)

    model = Classifier()
    found = extract(model, [rows()], tmp_path, batch_size=2)
    assert model.calls == 1
    assert torch.equal(found.values["train"], extract(bert(), [rows()], tmp_path, batch_size=2).values["train"])


def test_dropout_is_off_and_every_mode_comes_back(tmp_path):
    model = bert().train()
    model.encoder.layer[1].eval()
    before = [module.training for module in model.modules()]
    torch.manual_seed(1)
    one = extract(model, [rows()], tmp_path / "1").values["train"]
    torch.manual_seed(2)
    assert torch.equal(one, extract(model, [rows()], tmp_path / "2").values["train"])
    assert [module.training for module in model.modules()] == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not one.requires_grad
    assert not one.is_inference()  # a head of torch may train on them


def test_any_module_gives_features(tmp_path):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(net, nn.Dropout(), nn.Linear(4, 2))
    x, data = tensors(20, 3, 6, 6)
    found = extract(model, [data], tmp_path, layer="0.4", pooling=None)
    torch.testing.assert_close(found.values["train"], net.eval()(x).detach(), atol=1e-6, rtol=0)
    assert found.labels["train"] == [0, 1] * 10


@pytest.mark.parametrize("masked", [True, False])
def test_torchs_own_encoder_gives_features(masked, tmp_path):
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 2)

        def forward(self, x):
            padding = torch.zeros(x.shape[:2], dtype=torch.bool) if masked else None
            return self.head(self.encoder(x, src_key_padding_mask=padding))

    model = Encoder().eval()
    x, data = tensors(10, 5, 8)
    found = extract(model, [data], tmp_path, pooling="mean")
    assert found.layer == "encoder.layers.1"
    torch.testing.assert_close(found.values["train"], model.encoder(x).mean(1).detach(), atol=1e-5, rtol=0)


def test_a_ready_module_gives_the_features_of_its_network(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    module = TextClassification(config={"model_type": "bert", "vocab_size": 40, **sizes}, num_classes=2)
    found = extract(module, [rows()], tmp_path)
    assert found.layer == "network.bert.encoder.layer.1"
    assert torch.equal(found.values["train"], extract(module.network, [rows()], tmp_path).values["train"])


def test_bfloat16_is_computed_and_stored(tmp_path):
    model = bert().bfloat16()
    found = extract(model, [rows()], tmp_path)
    assert found.values["train"].dtype == torch.bfloat16
    assert torch.equal(found.values["train"], extract(model, [rows()], tmp_path).values["train"])
    exact = extract(bert(), [rows()], tmp_path)
    assert exact.computed == 30
    torch.testing.assert_close(found.values["train"].float(), exact.values["train"], atol=0.1, rtol=0)


def test_an_adapted_models_features_are_its_own(tmp_path):
    model, plain = lp.inject(bert(), lp.PrefixTuning(length=3)), extract(bert(), [rows()], tmp_path)
    found = extract(model, [rows()], tmp_path)
    assert (found.computed, found.cached) == (30, 0)
    reference = expected(model, sentences(), Collate(), -1, "cls")
    torch.testing.assert_close(found.values["train"], reference, atol=1e-5, rtol=0)
    assert (found.values["train"] - plain.values["train"]).abs().max() > 1e-3


def test_virtual_tokens_that_lengthen_rows_are_refused(tmp_path):
    model = lp.inject(bert(), lp.PromptTuning(length=3))
    with pytest.raises(ValueError, match=r"attention mask is \(1, \d+\): virtual tokens or a decoder"):
        extract(model, [rows()], tmp_path)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (3, r"layer=3 is none of the 3 blocks of this BertModel. Give a number from -3 to 2, or a glob"),
        (-4, "layer=-4 is none of the 3 blocks"),
        ("outptu", r"'outptu' matches nothing in the model. Close names: output"),
        ("output.dense", r"layer='output.dense' matches 6 modules: encoder.layer.0.attention.output.dense"),
        ("encoder.layer", "forward of BertModel never calls encoder.layer"),
    ],
)
def test_a_layer_that_is_not_there_is_refused_by_name(layer, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        extract(bert(), [rows()], tmp_path, layer)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_blocks_share_is_refused(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.shared = nn.Linear(6, 6)

        def forward(self, x):
            return self.shared(self.shared(x))

    with pytest.raises(ValueError, match="shared is called 2 times in one forward"):
        extract(Twice(), [tensors(4, 6)[1]], tmp_path, "shared", None)
    with pytest.raises(ValueError, match="none of the 0 blocks of this Twice. Give a glob"):
        extract(Twice(), [tensors(4, 6)[1]], tmp_path, -1, None)


@pytest.mark.parametrize(
    ("shape", "layer", "pooling", "said"),
    [
        ((6,), "0", "cls", "one vector per row already: set pooling to null"),
        ((5, 6), "0", None, r"is \(1, 5, 4\), not \(rows, features\): set pooling to cls, mean or last"),
        ((2, 5, 6), "0", None, "give a layer after which they are pooled"),
    ],
)
def test_a_shape_that_does_not_fit_the_pooling_is_refused(shape, layer, pooling, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        extract(nn.Sequential(nn.Linear(6, 4)), [tensors(4, *shape)[1]], tmp_path, layer, pooling)


def test_features_that_are_not_finite_are_refused_and_not_stored(tmp_path):
    items = [(torch.ones(6), 0), (torch.full((6,), float("inf")), 1)]
    data = Rows("train", items, torch.utils.data.default_collate, "labels")
    with pytest.raises(ValueError, match="1 of 2 rows are not finite, such as of row 1 of train, at layer 0"):
        extract(nn.Sequential(nn.Linear(6, 4)), [data], tmp_path, "0", None)
    assert not list(tmp_path.rglob("*.safetensors"))


def test_rows_that_differ_each_time_are_refused(tmp_path):
    class Noise(list):
        def __getitem__(self, number):
            return torch.randn(6), 0

    data = Rows("train", Noise(range(3)), torch.utils.data.default_collate, "labels")
    with pytest.raises(ValueError, match="Row 0 of train differs each time it is read"):
        extract(nn.Sequential(nn.Linear(6, 4)), [data], tmp_path, "0", None)


@pytest.mark.parametrize(
    ("items", "label", "said"),
    [
        ([{"input_ids": [1, 2]}], "labels", r"Row 0 of train has no label 'labels': it has \['input_ids'\]"),
        ([{"input_ids": [1, 2], "labels": 1}], "y", "Row 0 of train has no label 'y'"),
        ([torch.ones(3)], "labels", "Row 0 of train has no label 'labels': it has Tensor"),
        ([{"input_ids": [1, 2], "labels": [1, 2]}], "labels", r"has the label \[1, 2\], expected a whole number"),
        ([], "labels", "The train data has no rows"),
    ],
)
def test_missing_labels_are_refused(items, label, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        extract(bert(), [rows(items, label=label)], tmp_path)


def test_rows_come_in_the_order_of_the_dataset():
    data = feature_models.Numbers(20)
    found = rows_of(data, "train", "labels")
    assert [found.read(n)[2] for n in range(20)] == [label for _, label in data.train_dataloader().dataset]


def test_data_without_single_rows_is_refused():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([])

    class Data(feature_models.Numbers):
        def train_dataloader(self):
            return DataLoader(Stream())

        def val_dataloader(self):
            return []

        def test_dataloader(self):
            return DataLoader([1, 2], batch_size=None)

    with pytest.raises(TypeError, match="The train data is Stream, which can only be iterated over"):
        rows_of(Data(), "train", "labels")
    with pytest.raises(ValueError, match="val_dataloader gives 0 loaders, expected one. Leave 'validation' out"):
        rows_of(Data(), "validation", "labels")
    with pytest.raises(TypeError, match="batch_size=None"):
        rows_of(Data(), "test", "labels")
