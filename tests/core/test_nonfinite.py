"""NaN and infinity in adapters: a warning when they are loaded, an error when they are merged or exported."""

import pytest
import torch
from models import MODELS
from safetensors.torch import save_file
from trainer_models import Module, data, trainer

import lightning_peft as lp

KEY = "model.layers.1.self_attn.v_proj.peft.lora.b"


@pytest.fixture(params=[float("nan"), float("inf")], ids=["nan", "inf"])
def net(request):
    net = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    net.get_parameter(KEY).data[3, 1] = request.param
    return net


def test_loading_warns_and_names_the_tensor(net, tmp_path):
    lp.save_adapter(net, tmp_path / "lora")
    for load in (lp.load_adapter, lp.add_adapter):
        with pytest.warns(UserWarning, match=rf"holds NaN or infinity in {KEY} \(1 in all\)"):
            load(MODELS["llama"](), tmp_path / "lora")
    lp.export_peft(net, tmp_path / "peft", allow_nonfinite=True)
    with pytest.warns(UserWarning, match=r"peft holds NaN or infinity in .*v_proj.b \(1 in all\)"):
        back = lp.import_peft(MODELS["llama"](), tmp_path / "peft")
    assert not back.get_parameter(KEY).isfinite().all()


def test_checkpoints_warn_as_well(tmp_path):
    module, strategy = Module(), lp.PEFTStrategy(lp.LoRA(rank=2), show_summary=False)
    runs = trainer(strategy)
    runs.fit(module, data())
    module.net.get_parameter(KEY).data[0, 0] = float("nan")
    runs.save_checkpoint(tmp_path / "x.ckpt")
    with pytest.warns(UserWarning, match=rf"The checkpoint holds NaN or infinity in net.{KEY}"):
        back = lp.load_from_checkpoint(Module, tmp_path / "x.ckpt")
    assert back.net.get_parameter(KEY)[0, 0].isnan()


def test_merging_is_refused_unless_it_is_insisted_on(net, tmp_path):
    lp.save_adapter(net, tmp_path / "adapter")
    save_file(MODELS["llama"]().state_dict(), tmp_path / "base.safetensors")
    with lp.without_values():
        empty = MODELS["llama"]()
    said = rf"would be merged from {KEY} .* or pass allow_nonfinite=True"
    with pytest.raises(ValueError, match=said):
        lp.merge_files(empty, tmp_path / "base.safetensors", tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for keep in (False, True):
        with pytest.raises(ValueError, match=said):
            lp.merge(net, keep=keep)
    with pytest.raises(ValueError, match=said), lp.merged(net):
        pass
    assert len(list(lp.adapters(net))) == 6
    merged = lp.merge(net, allow_nonfinite=True)
    assert not merged.model.layers[1].self_attn.v_proj.weight.isfinite().all()
    assert merged.model.layers[0].self_attn.v_proj.weight.isfinite().all()


def test_exporting_is_refused_unless_it_is_insisted_on(net, tmp_path):
    with pytest.raises(ValueError, match="would be exported from .*v_proj.lora_B.weight .* allow_nonfinite=True"):
        lp.export_peft(net, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
    lp.export_peft(net, tmp_path / "peft", allow_nonfinite=True)
    assert (tmp_path / "peft").is_dir()


def test_finite_adapters_and_statistics_are_no_cause_for_a_warning(tmp_path):
    net = lp.inject(MODELS["llama"](), lp.LoRA(rank=2))
    lp.save_adapter(net, tmp_path / "adapter")
    back = lp.load_adapter(MODELS["llama"](), tmp_path / "adapter")
    assert torch.equal(lp.merge(back).lm_head.weight, MODELS["llama"]().lm_head.weight)
