"""Rounds without Flower's engine: what travels, what is averaged, what is refused, and what a repeated round gives."""

import io
import json
import logging
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import lightning_peft as lp

pytest.importorskip("flwr", reason="the extra 'federated' is not installed")

from federated_models import Points, points, run
from flwr.app import Array, ArrayRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM

from lightning_peft.recipes.federated import Dirichlet, Server, client_app
from lightning_peft.recipes.federated.engine import flower
from lightning_peft.recipes.federated.history import means, restore_strategy, strategy_state
from lightning_peft.recipes.federated.local_model import ClientModel
from lightning_peft.recipes.federated.settings import to_plain
from lightning_peft.recipes.settings_diff import changes

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`trainer.fit` stopped"),
]
LORA = lp.LoRA(rank=2, targets=["body"])


@pytest.fixture(autouse=True)
def _quiet():
    """Flower and Lightning log what every run does."""
    loggers = [logging.getLogger(name) for name in ("flwr", "lightning.pytorch")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


def replaced(reply, message=None, arrays=None, rows=None, **more):
    """Return a reply with other arrays, or another number of rows, or more metrics."""
    old = reply.content
    metrics = MetricRecord({**old["metrics"], **({} if rows is None else {"num-examples": rows}), **more})
    content = {"metrics": metrics}
    if "arrays" in old:
        content["arrays"] = old["arrays"] if arrays is None else arrays
    new = Message(RecordDict(content), dst_node_id=1, message_type="train")
    new.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    new.metadata.__dict__["_reply_to_message_id"] = reply.metadata.reply_to_message_id
    return new


def trained(client, only, change):
    """Return a change of one client's trained replies."""

    def apply(number, reply):
        is_train = not reply.has_error() and "arrays" in reply.content
        return change(reply) if number == client and is_train else reply

    return apply


def changed(name, new):
    """Return a change of one array of a reply."""

    def apply(reply):
        arrays = {key: array.numpy().copy() for key, array in reply.content["arrays"].items()}
        arrays[name] = new(arrays[name])
        return replaced(reply, arrays=ArrayRecord({key: Array(value) for key, value in arrays.items()}))

    return apply


def poke(value):
    def apply(array):
        array.flat[3] = value
        return array

    return apply


def test_the_average_is_weighted_by_rows(tmp_path):
    server, wire = run(points(tmp_path, method=LORA), rounds=1)
    replies = [reply.content for reply in wire.replies if "arrays" in reply.content]
    rows = [16, 19, 22]  # of 20, 24, 28 rows without the fifth that is held out
    assert sorted(content["metrics"]["num-examples"] for content in replies) == rows
    for name, value in server.history.arrays.items():
        total = sum(c["arrays"][name].numpy().astype(np.float64) * c["metrics"]["num-examples"] for c in replies)
        assert value.dtype == np.float32
        np.testing.assert_allclose(value, total / sum(rows), rtol=1e-6, atol=1e-7)
    assert server.history.local_rounds == [1, 1, 1]


def test_bytes_are_those_of_the_serialized_arrays(tmp_path):
    server, wire = run(points(tmp_path), rounds=1)

    def serialized(value):
        file = io.BytesIO()
        np.save(file, value)
        return len(file.getvalue())

    one = sum(map(serialized, server.history.arrays.values()))
    entry = server.history.rounds[0]
    assert (entry["down_bytes"], entry["up_bytes"], entry["evaluation_bytes"]) == (3 * one, 3 * one, 3 * one)
    assert entry["full_bytes"] == 3 * 4 * (8 * 6 + 8 + 3 * 8 + 3)  # body and head, of all three clients
    assert entry["ratio"] == one / (4 * 83)
    assert one == sum(4 * numbers + 128 for numbers in (8 * 2, 6 * 2, 3 * 8, 3))  # numpy's header is 128 bytes


@pytest.mark.parametrize("local", [[], ["head"], ["body.peft.fedpara.y1", "head.bias"]])
def test_the_local_part_never_travels(tmp_path, local):
    federation = points(tmp_path, local=local)
    server, wire = run(federation, rounds=2)
    state = {"body.peft.fedpara.x1", "body.peft.fedpara.y1", "head.weight", "head.bias"}
    stays = {name for name in state if name in local or name.partition(".")[0] in local}
    for message in [*wire.asked, *wire.replies]:
        names = {name for arrays in message.content.array_records.values() for name in arrays}
        assert names in (set(), state - stays)
    for name in federation.names:
        files = sorted((tmp_path / "run" / "clients" / name).glob("*.safetensors"))
        assert [file.name for file in files] == ["local-00001.safetensors", "local-00002.safetensors"]
        assert set(load_file(files[1])) == stays | {"body.peft.fedpara.x2", "body.peft.fedpara.y2"}


def test_without_a_local_part_a_client_keeps_nothing(tmp_path):
    run(points(tmp_path, method=LORA), rounds=2)
    assert not list((tmp_path / "run" / "clients").glob("*/local-*"))


def test_clients_differ_by_their_local_part_alone(tmp_path):
    federation = points(tmp_path)
    server, wire = run(federation, rounds=2)
    asked = wire.sent("evaluate")[-3:]
    sent = [{name: array.numpy() for name, array in message.content["arrays"].items()} for message in asked]
    bases = [(torch.manual_seed(1), Points())[1] for _ in range(3)]
    personal = [lp.load_adapter(bases[client], federation.home(client) / "adapter") for client in range(3)]
    for name, value in server.history.arrays.items():
        assert all(np.array_equal(arrays[name], value) for arrays in sent)
        assert all(np.array_equal(module.state_dict()[name].numpy(), value) for module in personal)
    own = [module.state_dict()["body.peft.fedpara.x2"] for module in personal]
    assert not torch.equal(own[0], own[1])
    metrics = server.history.rounds[-1]["clients"]
    for client, module in enumerate(personal):
        rows = federation.shard(client).examples("test")
        right = [module.eval()(torch.tensor(row["x"])).argmax().item() == row["labels"] for row in rows]
        assert metrics[f"client_{client}"]["test_accuracy"] == pytest.approx(np.mean(right))


def test_means_count_each_client_once_or_by_rows():
    found = {"a": {"num-examples": 1, "accuracy": 1.0}, "b": {"num-examples": 3, "accuracy": 0.5}}
    assert means(found) == {"accuracy": {"mean": 0.75, "weighted_mean": 0.625}}
    assert means({}) == {}


BAD = {
    "NaN": (changed("head.weight", poke(np.nan)), "head.weight holds NaN or infinity"),
    "infinity": (changed("head.weight", poke(-np.inf)), "head.weight holds NaN or infinity"),
    "shape": (changed("head.bias", lambda a: a[:2]), r"head.bias is float32 \(2,\), expected float32 \(3,\)"),
    "type": (changed("head.bias", lambda a: a.astype(np.float64)), "head.bias is float64"),
    "rows": (lambda reply: replaced(reply, rows=0), "num-examples is 0, not positive"),
    "NaN rows": (lambda reply: replaced(reply, rows=float("nan")), "num-examples is nan, not a finite number"),
    "metrics": (lambda reply: replaced(reply, bonus=1.0), "its metrics are .*bonus.*, expected 'num-examples'"),
    "nothing": (lambda reply: replaced(reply, arrays=ArrayRecord()), r"it lacks \['body.* \(4\) and adds \[\] \(0\)"),
    "no reply": (lambda reply: None, "no reply within 5 seconds"),
}


def lying(reply):
    """Return a reply whose bytes are not what its description says."""
    arrays = dict(reply.content["arrays"])
    arrays["head.bias"] = Array("float32", (3,), "numpy.ndarray", b"no numbers")
    return replaced(reply, arrays=ArrayRecord(arrays))


def turned(reply):
    return replaced(reply, arrays=ArrayRecord(dict(reversed(list(reply.content["arrays"].items())))))


def failed(reply):
    error = Message(Error(code=2, reason="way\nthere\nValueError: boo"), reply_to=outgoing(reply))
    error.metadata.__dict__["_src_node_id"] = reply.metadata.src_node_id
    return error


def outgoing(reply):
    message = Message(RecordDict(), dst_node_id=reply.metadata.src_node_id, message_type="train")
    message.metadata.__dict__["_message_id"] = reply.metadata.reply_to_message_id
    return message


BAD |= {
    "bytes": (lying, "head.bias cannot be read"),
    "order": (turned, "its arrays are in another order"),
    "error": (failed, "^ValueError: boo$"),
}


_QUICK = ("NaN", "rows", "bytes", "error")


@pytest.mark.parametrize("kind", [k if k in _QUICK else pytest.param(k, marks=pytest.mark.slow) for k in BAD])
def test_nothing_of_a_refused_client_enters_the_average(tmp_path, kind, caplog):
    change, reason = BAD[kind]
    federation = points(tmp_path, test_fraction=0.5)
    with caplog.at_level(logging.WARNING, "lightning_peft"):
        server, wire = run(federation, rounds=1, change=trained(1, True, change), timeout=5)
    entry = server.history.rounds[0]
    assert entry["used"] == ["client_0", "client_2"]
    assert list(entry["refused"]) == ["client_1"]
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(entry["refused"]["client_1"])
    assert f"Round 1 refuses the training of client_1: {entry['refused']['client_1']}" in caplog.text
    assert server.history.local_rounds == [1, 0, 1]
    good = [r.content for r in wire.replies if not r.has_error() and "arrays" in r.content]
    good = [c for c in good if c["metrics"]["num-examples"] in (10, 14)]  # halves of 20 and 28 rows
    weights = [c["metrics"]["num-examples"] for c in good]
    for name, value in server.history.arrays.items():
        pair = [c["arrays"][name].numpy().astype(np.float64) for c in good]
        np.testing.assert_allclose(value, np.average(pair, axis=0, weights=weights), rtol=1e-6, atol=1e-7)


def test_a_refused_client_goes_on_from_where_it_was_last_used(tmp_path):
    def once(client, reply):
        is_second = not reply.has_error() and "arrays" in reply.content and (calls.append(client) or len(calls) > 3)
        return None if client == 1 and is_second and len(calls) <= 6 else reply

    calls = []
    server, wire = run(points(tmp_path), rounds=3, change=once, timeout=1)
    assert [entry["used"] for entry in server.history.rounds][1] == ["client_0", "client_2"]
    assert server.history.local_rounds == [3, 3, 3]
    third = wire.sent("train")[-1].content["config"]
    assert list(third["local-rounds"]) == [2, 1, 2]


def test_failures_of_clients_are_told_by_name(tmp_path):
    server, _ = run(points(tmp_path, ("no", "nan", "raise", "no")), rounds=2)
    for entry in server.history.rounds:
        assert entry["used"] == ["client_0", "client_3"]
        assert list(entry["refused"]) == ["client_1", "client_2"]  # replies came in the other order
        # The local part is looked at first, at home.
        assert "holds NaN or infinity after training" in entry["refused"]["client_1"]
        assert entry["refused"]["client_2"] == "ValueError: no training today"
        assert len(entry["clients"]) == 4  # those who could not train are tested all the same


def test_a_round_without_clients_keeps_the_state_and_too_many_end_the_run(tmp_path):
    federation = points(tmp_path, ("raise", "raise"))
    with pytest.raises(
        RuntimeError, match="2 rounds in a row had no usable client, .*client_1: ValueError: no training"
    ):
        run(federation, rounds=5, failed_rounds=2)
    server = Server(federation, FedAvg, 5)
    first = ClientModel(federation).first[0]
    assert [entry["used"] for entry in server.history.rounds] == [[], []]
    assert all(np.array_equal(server.history.arrays[name], first[name].numpy()) for name in first)
    assert server.history.local_rounds == [0, 0]


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [FedAvg, lambda: FedAvgM(server_momentum=0.9), FedAdam])
def test_a_repeated_round_gives_the_same_bits(tmp_path, strategy):
    def kill(client, reply):
        calls.append(client)
        if len(calls) == 3 + 6 + 6 + 2:  # greetings, two rounds, two clients of the third
            raise Killed
        return reply

    calls, federation = [], points(tmp_path)
    run(federation, rounds=4, strategy=strategy)
    whole = files(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(Killed):
        run(federation, rounds=4, strategy=strategy, change=kill)
    assert len(json.loads((tmp_path / "run" / "report.json").read_text())["rounds"]) == 2
    server, wire = run(federation, rounds=4, strategy=strategy)
    assert len(wire.sent("train")) == 6
    assert files(tmp_path / "run") == whole


def test_more_rounds_can_follow(tmp_path):
    federation = points(tmp_path, method=LORA)
    run(federation, rounds=1)
    server, wire = run(federation, rounds=2)
    assert len(wire.sent("train")) == 3
    again = points(tmp_path, method=LORA, run=tmp_path / "again")
    straight, _ = run(again, rounds=2)
    assert all(np.array_equal(server.history.arrays[k], v) for k, v in straight.history.arrays.items())
    with pytest.raises(ValueError, match="has 2 rounds already, expected up to 1"):
        run(federation, rounds=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 2}, "epochs was 1 and is 2"),
        ({"local": ["head"]}, r"local was \[\] and is \['head'\]"),
        ({"method": LORA}, "peft.methods was"),
        ({"pause": 0.001}, "model.pause was 0.0 and is 0.001"),
        ({"seed": 2}, "seed was 1 and is 2"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, change, message):
    Server(points(tmp_path), FedAvg, 2)
    with pytest.raises(ValueError, match=f"holds rounds with other settings: .*{message}"):
        Server(points(tmp_path, **change), FedAvg, 2)
    with pytest.raises(ValueError, match="strategy was .*FedAvg' and is .*FedAdam'"):
        Server(points(tmp_path), FedAdam, 2)


def test_a_damaged_state_is_refused(tmp_path):
    Server(points(tmp_path), FedAvg, 2)
    path = tmp_path / "run" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="state.safetensors is damaged"):
        Server(points(tmp_path), FedAvg, 2)


def test_a_local_part_that_is_gone_is_told(tmp_path):
    federation = points(tmp_path)
    run(federation, rounds=1)
    (federation.home(2) / "local-00001.safetensors").unlink()
    server, _ = run(federation, rounds=2)
    assert "local-00001.safetensors is missing" in server.history.rounds[1]["refused"]["client_2"]


def test_a_client_with_another_model_is_refused(tmp_path):
    from federated_models import Wire, outside_of_flower
    from flwr.serverapp.strategy import FedAvg

    outside_of_flower()
    server = Server(points(tmp_path), FedAvg, 1, failed_rounds=1)
    other = points(tmp_path, method=lp.FedPara(rank=1, personalized=True, targets=["body"]))
    with pytest.raises(RuntimeError, match="The server has another model: methods was"):
        server.run(Wire(client_app(other), 3))


def test_clients_that_never_come_are_named(tmp_path):
    def mute(client, reply):
        return None if client == 1 else reply

    with pytest.raises(RuntimeError, match="Of 3 clients, client_1 did not answer; 2 nodes did. Each node needs"):
        run(points(tmp_path), change=mute, timeout=0.3)


@pytest.mark.slow
def test_a_part_of_the_clients_is_drawn_by_the_seed(tmp_path):
    def half():
        return FedAvg(fraction_train=0.5, min_train_nodes=2)

    drawn = [run(points(tmp_path, ("no",) * 5, run=tmp_path / f"{i}"), strategy=half, rounds=3)[0] for i in range(2)]
    drawn = [[entry["used"] for entry in server.history.rounds] for server in drawn]
    assert drawn[0] == drawn[1]
    assert all(len(used) == 2 for used in drawn[0])
    assert len(set(map(tuple, drawn[0]))) > 1


def test_the_strategys_memory_survives(tmp_path):
    strategy = FedAvgM(server_momentum=0.5)
    strategy.momentum_vector = [np.full(i + 1, i, np.float32) for i in range(12)]
    strategy.current_arrays = ArrayRecord({"b": Array(np.ones(2)), "a": Array(np.zeros(1))})
    restore_strategy(new := FedAvgM(server_momentum=0.5), strategy_state(strategy))
    assert all(np.array_equal(x, y) for x, y in zip(new.momentum_vector, strategy.momentum_vector, strict=True))
    assert [(k, a.numpy().tolist()) for k, a in new.current_arrays.items()] == [("a", [0.0]), ("b", [1.0, 1.0])]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"local": ["haed"]}, "local has 'haed', which matches nothing that trains. Close names: 'head'"),
        ({"local": ["head", "body"]}, "Nothing would travel"),
        ({"epochs": 0}, "epochs=0"),
        ({"test_fraction": 1.0}, "test_fraction=1.0"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        ClientModel(points(tmp_path, **settings))


def test_what_has_no_mean_does_not_travel(tmp_path):
    module = Points()
    module.norm = torch.nn.BatchNorm1d(8)
    federation = points(tmp_path)
    object.__setattr__(federation, "model", lambda: module)
    federation.peft.also_train.append("norm")
    with pytest.raises(ValueError, match=r"A mean of norm.num_batches_tracked \(torch.int64\) would mean nothing"):
        ClientModel(federation)


def test_a_strategy_that_asks_for_too_many_clients_is_refused(tmp_path):
    with pytest.raises(ValueError, match="min_train_nodes=4 of 3 clients"):
        Server(points(tmp_path), lambda: FedAvg(min_train_nodes=4), 1)


def test_settings_become_plain_data(tmp_path):
    assert to_plain(Dirichlet(clients=3)) == {
        "class": "lightning_peft.recipes.federated.partition.Dirichlet",
        **{"clients": 3, "alpha": 0.3, "label": "label", "min_rows": 10, "seed": 0},
    }
    assert json.loads(json.dumps(points(tmp_path).plain())) == points(tmp_path).plain()
    assert points(tmp_path) == points(tmp_path) != points(tmp_path, seed=3)
    assert changes({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "c": 3}, "d": 0}) == [
        "a.c was 2 and is 3",
        "d was None and is 0",
    ]


def test_without_flower_the_error_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"lightning-peft\[federated\]"):
        flower()
