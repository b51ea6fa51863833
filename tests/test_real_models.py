"""On real models, where they are beside the checkout."""

import pytest
import torch
import torch.nn.functional as F
from installed import needs
from torch import nn

import lightning_peft as lp

pytestmark = needs("transformers")


@pytest.mark.slow
def test_adapters_of_a_really_trained_llama_change_little_by_little(shared):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / "stories260K"
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    batch = tokenizer("Once upon a time there was a little girl who had a red ball.", return_tensors="pt")
    x = batch["input_ids"]
    with torch.no_grad():
        before = model(x, labels=x).loss
    assert before < 3  # a random model of 512 tokens has 6.2
    lp.inject(model, lp.LLaMAAdapter())
    assert len(list(lp.adapters(model))) == 3
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(30):
        loss = model(x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[0] == before.item()
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stories260K", "tinystories-656k"])
def test_text_of_a_prompt_starts_as_its_embeddings(shared, name):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared / "models" / name
    model = AutoModelForCausalLM.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)("a happy story", add_special_tokens=False)["input_ids"]
    lp.inject(model, lp.PromptTuning(length=2 * len(words), init="text", init_text="a happy story"))
    ((*_, adapter),) = lp.adapters(model)
    assert torch.equal(adapter.prompt, model.get_input_embeddings().weight[words + words])


class BasicBlock(nn.Module):
    """Two convolutions beside a shortcut without parameters (He et al. 2016, option A)."""

    def __init__(self, width, out, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.stride, self.more = stride, (out - width) // 2

    def forward(self, x):
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more, self.more))
        return F.relu(y + shortcut)


class ResNet20(nn.Module):
    """ResNet for CIFAR-10; says how it is called, so that its structure is measured."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(BasicBlock(16, 16, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(BasicBlock(16, 32, 2), BasicBlock(32, 32, 1), BasicBlock(32, 32, 1))
        self.layer3 = nn.Sequential(BasicBlock(32, 64, 2), BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.linear = nn.Linear(64, 10)
        self.example_input_array = torch.randn(1, 3, 32, 32)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.linear(x.mean((2, 3)))


def images(shared, part):
    """Return images as the network was trained on, and labels."""
    numpy = pytest.importorskip("numpy")
    arrays = numpy.load(shared / "data" / "cifar10_small" / "cifar10_2000_1000.npz")
    x, y = (torch.from_numpy(arrays[f"{kind}_{part}"]) for kind in "xy")
    mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x.permute(0, 3, 1, 2).float() / 255 - mean) / std, y.long()


@torch.no_grad()
def accuracy(model, x, y):
    return (model.eval()(x).argmax(-1) == y).float().mean().item()


@pytest.mark.slow
def test_lora_on_convolutions_of_a_really_trained_resnet_learns_turned_images(shared):
    file = torch.load(shared / "models/resnet-cifar10/resnet20-12fca82f.th", map_location="cpu", weights_only=False)
    model = ResNet20()
    model.load_state_dict({key.removeprefix("module."): value for key, value in file["state_dict"].items()})
    (x, y), (test_x, test_y) = images(shared, "train"), images(shared, "test")
    assert accuracy(model, test_x, test_y) == pytest.approx(0.803, abs=2e-3)
    turned, turned_test = x.rot90(1, (2, 3)), test_x.rot90(1, (2, 3))
    before = accuracy(model, turned_test, test_y)
    torch.manual_seed(0)
    lp.inject(model, lp.LoRA(rank=8, targets=["all-linear"]))
    assert len(list(lp.adapters(model))) == 18  # the convolutions of nine blocks
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(2):
        for rows in torch.randperm(len(turned)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model.eval()(turned[rows]), y[rows]).backward()
            optimizer.step()
    after = accuracy(model, turned_test, test_y)
    print(f"turned images: {before:.3f} before, {after:.3f} after; {lp.summary(model).trainable:,} parameters")  # noqa: T201
    assert after > before + 0.1
    assert accuracy(lp.merge(model), turned_test, test_y) == pytest.approx(after, abs=2e-3)
