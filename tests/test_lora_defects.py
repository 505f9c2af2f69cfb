"""Where diffusers and PEFT depart from what a LoRA's file says: `tests/REFERENCE_DEFECTS.md`."""

import pytest
import torch
from lora_files import ATTENTION, TEXT, kohya, pairs, peft, write
from tiny_pairs import Models

FP64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore")


def deltas(pipe, places, adapter: str) -> dict:
    """What diffusers and PEFT will add to each layer, by our names of it."""
    found = {}
    for part, layer in places:
        module = getattr(pipe, part).get_submodule(layer)
        found[part, layer] = module.get_delta_weight(adapter)
    return found


def test_defect_each_layer_gets_the_most_frequent_alpha(models: Models, tmp_path) -> None:
    ours, theirs = models.ours("sd1", FP64), models.reference("sd1", FP64)
    places = pairs(ours, ATTENTION, TEXT)
    found = {place: pair._replace(alpha=1.0 + k % 3) for k, (place, pair) in enumerate(places.items())}
    file = write(tmp_path / "style.safetensors", kohya(found))
    theirs.load_lora_weights(tmp_path, weight_name=file.name, adapter_name="style")
    try:
        added = deltas(theirs, found, "style")
    finally:
        theirs.unload_lora_weights()
    wrong = 0.0
    for place, delta in added.items():
        exact = found[place]._replace(down=found[place].down.double(), up=found[place].up.double())
        assert delta.abs().mean() > 1e-3
        wrong = max(wrong, (delta - exact.delta(delta.shape)).abs().max().item())
    assert wrong > 0.1
    before = {p: ours.parts()[p[0]].get_submodule(p[1]).weight.data for p in found}
    with ours.lora(file):
        for (part, layer), pair in found.items():
            exact = pair._replace(down=pair.down.double(), up=pair.up.double())
            change = ours.parts()[part].get_submodule(layer).weight.data - before[part, layer]
            assert (change - exact.delta(change.shape)).abs().max() < 1e-14


def test_defect_the_second_encoder_s_flat_names_are_an_index_error(models: Models, tmp_path) -> None:
    ours, theirs = models.ours("sdxl"), models.reference("sdxl")
    found = pairs(ours, (), TEXT)
    flat = {name.replace("text_model.", ""): tensor for name, tensor in peft(found).items()}
    files = [write(tmp_path / f"{k}.safetensors", each) for k, each in enumerate((flat, peft(found)))]
    try:
        with pytest.raises(IndexError):
            theirs.load_lora_weights(tmp_path, weight_name=files[0].name)
    finally:
        theirs.unload_lora_weights()  # it has put the first encoder's half on
    with ours.lora(files[0]):
        first = ours.text_encoder_2.encoder.layers[0].self_attn.q_proj.weight.clone()
    with ours.lora(files[1]):
        assert torch.equal(ours.text_encoder_2.encoder.layers[0].self_attn.q_proj.weight, first)
    assert not torch.equal(ours.text_encoder_2.encoder.layers[0].self_attn.q_proj.weight, first)
