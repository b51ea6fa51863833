"""Damaged files: refused by a ``ValueError`` with a sentence, in little time and memory, or read as equal."""

import copy
import io
import json
import pickle
import random
import resource
import struct
import time
import zipfile
from collections import Counter

import pytest
import torch
from adapter_edits import CONFIG, WEIGHTS, sign
from safetensors.torch import load_file, save_file
from writers import Checkpoints, Module, adapted, base

import lightning_peft as lp
from lightning_peft.checkpoints.reader import read_adapter_file
from lightning_peft.core.injection_record import get_record

LONGEST, LARGEST = 3.0, 400  # seconds of a processor for one file, and MB of memory beyond those before


def state_of(net):
    """Return all that a load can change in a model: values, classes, what trains."""
    values = {key: value.clone() for key, value in net.state_dict().items()}
    methods = record.methods if (record := get_record(net)) else None
    return values, [type(module) for module in net.modules()], [p.requires_grad for p in net.parameters()], methods


def same(one, other):
    alike = one[0].keys() == other[0].keys() and all(torch.equal(value, other[0][key]) for key, value in one[0].items())
    return alike and one[1:] == other[1:]


class Outcomes:
    """Counts what becomes of damaged files; whatever is neither refused nor equal is an error at once.

    Args:
        read: Reads the file into a model that it returns, or into the given one.
        fresh: Returns the model.
    """

    def __init__(self, read, fresh=base):
        self.read, self.fresh, self.counts, self.longest = read, fresh, Counter(), 0.0
        self.good, self.net = state_of(read(fresh())), fresh()
        self.untouched = state_of(self.net)
        self.memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def add(self, what):
        start = time.process_time()
        try:
            found = state_of(self.read(self.net))
        except (ValueError, FileNotFoundError) as error:
            self.refuse(what, str(error))
        else:
            self.accept(what, same(found, self.good))
            self.net = self.fresh()
        self.longest = max(self.longest, time.process_time() - start)

    def refuse(self, what, sentence):
        unchanged, is_sentence = same(state_of(self.net), self.untouched), len(sentence) > 20 and "\n" not in sentence
        assert is_sentence, (what, sentence)
        assert unchanged, f"{what} was refused and changed the model"
        self.counts["refused"] += 1

    def accept(self, what, equal):
        assert equal, f"{what} was read as something else"
        self.counts["equal"] += 1

    def end(self, name):
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - self.memory) / 1024
        print(f"\n{name}: {dict(self.counts)}; longest {self.longest:.2f} s, {grown:.0f} MB more at the most")
        assert self.longest < LONGEST
        assert grown < LARGEST
        assert self.counts["refused"] > 0


def flip(path, bit):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["own", "peft"])
def test_each_flipped_bit_of_settings_and_header_and_two_thousand_of_data(format, memory):
    place = memory / "adapter"
    if format == "own":
        lp.save_adapter(adapted(2), place)
        outcomes = Outcomes(lambda net: lp.load_adapter(net, place))
    else:
        lp.export_peft(adapted(2), place, model_card=False)
        outcomes = Outcomes(lambda net: lp.import_peft(net, place))
    config, weights = (place / CONFIG).read_bytes(), (place / WEIGHTS).read_bytes()
    header = 8 + int.from_bytes(weights[:8], "little")
    for name, content, chosen in (
        (CONFIG, config, range(8 * len(config))),
        (WEIGHTS, weights, range(8 * header)),
        (WEIGHTS, weights, random.Random(0).sample(range(8 * header, 8 * len(weights)), 2000)),
    ):
        for bit in chosen:
            flip(place / name, bit)
            outcomes.add(f"bit {bit} of {name}")
            (place / name).write_bytes(content)
        for size in (*range(0, 64), *random.Random(0).sample(range(len(content)), 60)):
            (place / name).write_bytes(content[:size])
            outcomes.add(f"{size} bytes of {name}")
        (place / name).write_bytes(content)
    outcomes.end(
        f"{format}: every bit of {len(config)} bytes of settings and {header} of header, 2,000 bits of data, cuts"
    )


VALUES = (
    None,
    True,
    0,
    -1,
    10**9,
    1.5,
    float("nan"),
    "",
    "x",
    "*" * 999,
    [],
    ["a"],
    [None],
    {},
    {"a": 1},
    [[]],
    ["0"] * 5000,
)


def places(data, path=()):
    """Yield the paths of all values in nested data."""
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from places(value, (*path, key))


def replaced(data, path, value):
    data = copy.deepcopy(data)
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data


class Hostile(Outcomes):
    """Of settings with a right checksum: what is read may be another adapter, which is no damage."""

    def accept(self, what, equal):
        self.counts["read"] += 1


def nested(depth):
    return "[" * depth + "]" * depth


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*holds NaN or infinity")
@pytest.mark.parametrize("format", ["own", "peft"])
def test_settings_of_wrong_types_or_sizes_are_refused_though_their_checksum_is_right(format, memory):
    place = memory / "adapter"
    if format == "own":
        lp.save_adapter(adapted(2), place)
    else:
        lp.export_peft(adapted(2), place, model_card=False)
        save_file(load_file(place / WEIGHTS), place / WEIGHTS)  # as HF PEFT writes it, without a checksum
    outcomes = Hostile(lambda net: (lp.load_adapter if format == "own" else lp.import_peft)(net, place))
    config = json.loads((place / CONFIG).read_text())
    for path in places(config):
        for value in VALUES:
            changed = replaced(config, path, value)
            if format == "own":
                sign(place, {key: value for key, value in changed.items() if key != "sha256"})
            else:
                (place / CONFIG).write_text(json.dumps(changed))
            outcomes.add(f"{path} = {str(value)[:50]}")
    method = {"method": "LoRA", "name": "x"}
    many = {**config, "methods": [{**method, "name": f"x{number}"} for number in range(100_000)]}
    texts = [
        nested(10_000),
        nested(10**6),
        '{"a":' * 10_000,
        "9" * 10**5,
        '{"a": 1' + "0" * 10**5 + "}",
        "null",
        " " * 2**25,
    ]
    for text in [*texts, json.dumps(many)]:
        (place / CONFIG).write_text(text)
        outcomes.add(text[:30])
    outcomes.end(f"{format}: settings of wrong types and sizes")


def headers():
    """Return headers of safetensors files that lie."""
    entry = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    second = {"dtype": "F32", "shape": [2], "data_offsets": [16, 24]}
    return {
        "overlap": {"a": entry, "b": {**second, "data_offsets": [8, 16]}},
        "gap": {"a": entry, "b": {**second, "data_offsets": [20, 28]}},
        "backwards": {"a": {**entry, "data_offsets": [16, 0]}},
        "negative": {"a": {**entry, "data_offsets": [-16, 0]}},
        "huge": {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}},
        "huge product": {"a": {"dtype": "F32", "shape": [2**40, 2**40, 2**40], "data_offsets": [0, 16]}},
        "zeros": {"a": {"dtype": "F32", "shape": [2**62, 0], "data_offsets": [0, 0]}},
        "dimensions": {"a": {"dtype": "F32", "shape": [1] * 10**5, "data_offsets": [0, 4]}},
        "shape": {"a": {**entry, "shape": [3]}},
        "no shape": {"a": {"dtype": "F32", "data_offsets": [0, 16]}},
        "text": {"a": "b"},
        "float": {"a": {**entry, "shape": [4.0]}},
        "type": {"a": {**entry, "dtype": "F32\n"}},
        "metadata": {"a": entry, "__metadata__": {"x": [1]}},
        "many": {str(number): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for number in range(100_000)},
    }


@pytest.mark.slow
def test_headers_that_lie_are_refused(memory):
    place = lp.save_adapter(adapted(2), memory / "adapter")
    outcomes = Outcomes(lambda net: lp.load_adapter(net, place))
    for name, header in headers().items():
        text = json.dumps(header).encode()
        (place / WEIGHTS).write_bytes(struct.pack("<Q", len(text)) + text + bytes(24))
        outcomes.add(name)
    for length in (0, 1, 2**31, 2**63, 2**64 - 1):
        (place / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}" + bytes(24))
        outcomes.add(f"length {length}")
    with (place / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 2**30))
        file.truncate(2**31)  # a header of a gigabyte of zeros, in a sparse file
    outcomes.add("sparse")
    outcomes.end("headers")


def archives(good):
    """Return files that are no checkpoints, or bombs."""
    bomb, names = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**28))
    with zipfile.ZipFile(names, "w") as archive:
        for number in range(5000):
            archive.writestr(f"archive/data/{number}", b"")

    class Runs:
        def __reduce__(self):
            return exec, ("raise SystemExit('code of a file ran')",)

    saved = torch.load(io.BytesIO(good), weights_only=True)
    state = saved["state_dict"]
    key = next(iter(state))
    yield from {"empty": b"", "text": b"text", "bomb": bomb.getvalue(), "names": names.getvalue()}.items()
    yield from {"code": pickle.dumps(Runs()), "number": pickle.dumps(1), "deep": b"(" * 10**5 + b"."}.items()
    for name, value in {
        "meta": torch.ones(2, 64, device="meta"),
        "expanded": torch.ones(1).expand(10**6, 10**6),
        "sparse": torch.eye(4).to_sparse(),
        "number": 1,
        "nothing": None,
        "shape": torch.ones(3),
        "complex": torch.ones(2, 64, dtype=torch.complex64),
    }.items():
        file = io.BytesIO()
        torch.save({**saved, "state_dict": {**state, key: value}}, file)
        yield f"tensor of {name}", file.getvalue()
    for path in places({key: saved[key] for key in ("lightning_peft", "state_dict")}):
        if path[0] == "lightning_peft" or len(path) == 1:
            for value in (None, 1, "x", [], {}, torch.ones(2)):
                file = io.BytesIO()
                torch.save(replaced(saved, path, value), file)
                yield f"{path} = {value}", file.getvalue()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_broken_checkpoints_and_archives_are_refused(memory):
    Checkpoints(memory).write(2)
    path = memory / "last.ckpt"
    good = path.read_bytes()
    loads = Outcomes(lambda net: lp.load_from_checkpoint(Module, path), Module)
    reads = Hostile(lambda net: (read_adapter_file(path), net)[1], Module)

    def add(what, content):
        path.write_bytes(content)
        loads.add(what)
        reads.add(what)

    for name, content in archives(good):
        add(name, content)
    draw = random.Random(0)
    for size in draw.sample(range(len(good)), 40):
        add(f"{size} bytes", good[:size])
    for bit in draw.sample(range(8 * len(good)), 150):
        content = bytearray(good)
        content[bit // 8] ^= 1 << bit % 8
        add(f"bit {bit}", bytes(content))
    loads.end("checkpoints, load_from_checkpoint")
    reads.end("checkpoints, read_adapter_file")
