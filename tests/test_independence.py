"""ldm stands alone: it draws, encodes and learns where diffusers and transformers cannot be imported at all.

Also: importing it costs nothing, and its modules import each other in the direction that the design states.
"""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ldm"

BLOCK = """
import sys

class Block:
    # First in the row of finders: these names have no module.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is blocked")

BLOCKED = (
    "diffusers", "transformers", "accelerate", "tokenizers", "huggingface_hub", "peft", "compel", "scipy", "ftfy"
)
sys.meta_path.insert(0, Block())
"""

NOTHING_CAME_IN = """
assert not {name.partition(".")[0] for name in sys.modules} & set(BLOCKED)
print("done")
"""


def python(program, *args, cwd):
    """Run a program in a fresh interpreter, outside the checkout; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---------------------------------------------------------------------------------------------------- alone


def test_the_block_holds(tmp_path):
    """Otherwise the tests below show nothing."""
    program = BLOCK + "try:\n    import diffusers\nexcept ImportError as error:\n    print(error)"
    assert python(program, cwd=tmp_path) == "diffusers is blocked\n"


def test_importing_ldm_imports_neither_torch_nor_numpy(tmp_path):
    program = (
        "import sys, ldm; print(ldm.__version__, sorted({'torch', 'numpy', 'PIL', 'safetensors'} & set(sys.modules)))"
    )
    assert python(program, cwd=tmp_path).split(maxsplit=1)[1] == "[]\n"


ROAD = """
import torch
import ldm
from ldm import scenes
from ldm.cli import main
from ldm.samplers import SAMPLERS
from ldm.train.data import to_tensor

pipe = ldm.load(sys.argv[1])
for sampler in SAMPLERS:
    result = pipe("a large red house", sampler=sampler, steps=2, width=32, height=24)
    assert result.images[0].size == (32, 24) and result.x0.std() > 0.1, sampler
for levels in ({"sigmas": "karras", "rule": "dpm"}, {"timesteps": [900, 300]}, {"compat": True, "sampler": "unipc2"}):
    assert pipe("a large red house", steps=2, width=32, height=24, **levels).x0.std() > 0.1, levels

picture, words = scenes.draw(seed=7)
image = to_tensor(picture.image[None, :32, :32])
assert image.std() > 0 and words
x0 = pipe.vae.encode(image)
assert x0.shape == (1, 4, 4, 4) and pipe.decode(x0)[0].size == (32, 32)

command = ["generate", words, "--model", sys.argv[1], "--steps", "2", "--width", "16", "--height", "16"]
assert main([*command, "--out", "picture.png", "--save-steps", "steps"]) == 0
assert main(["rerun", "picture.png"]) == 0
assert main(["samplers"]) == 0
assert main(["schedule", "--steps", "3", "--sigmas", "exponential"]) == 0
open("prompts.txt", "w").write(words + "\\na tree\\n")
assert main(["generate", "--prompts", "prompts.txt", *command[2:], "--out", "pictures/"]) == 0
assert main(["evaluate", "--count", "2", "--steps", "2", "--out", "seen"]) == 0
"""

LEARN = """
from pathlib import Path
import torch
from ldm import scenes
from ldm.models.unet import UNet, UNetConfig
from ldm.models.vae import VAE, VAEConfig
from ldm.schedules import ScheduleConfig, alpha_bars
from ldm.text.clip import TextConfig, VisionConfig
from ldm.text.tokenizer import Tokenizer
from ldm.train import checker, clip, export, unet, vae
from ldm.train.common import Optimizer
from ldm.train.vocabulary import save_vocabulary, train_vocabulary

captions = [scenes.caption(scenes.sample(seed), seed) for seed in range(20)]
save_vocabulary("tokenizer", *train_vocabulary(captions, 530))
ids = Tokenizer.from_folder("tokenizer")(captions[:2]).ids
x = torch.rand(2, 3, 32, 32) * 2 - 1

def learn(model, loss):
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert torch.isfinite(torch.tensor(Optimizer([model], 1e-3).step(loss, 1.0)))
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())

small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
joint = {**small, "projection_dim": 8}
towers = clip.CLIP(TextConfig(**joint, vocab_size=530, with_projection=True, eos_token_id=529),
                   VisionConfig(**joint, image_size=64, patch_size=16))
images = towers.vision(clip.shrink(torch.rand(2, 3, 128, 128)))
learn(towers, towers.loss(images, towers.text(ids).pooled))

model = VAE(VAEConfig(block_out_channels=(8, 8, 8, 8), norm_num_groups=4))
learn(model, vae.loss(model, x, torch.ones(2, 1, 32, 32), torch.randn(2, 4, 4, 4), 1e-6))

fields = {"block_out_channels": [8], "down_block_types": ["CrossAttnDownBlock2D"], "attention_head_dim": 2,
          "up_block_types": ["CrossAttnUpBlock2D"], "norm_num_groups": 4, "cross_attention_dim": 16}
model, bars = UNet(UNetConfig.from_json(fields)), alpha_bars(ScheduleConfig())
learn(model, unet.loss(model, torch.randn(2, 4, 4, 4), towers.text.context(ids).detach(), torch.tensor([3, 900]),
                       torch.randn(2, 4, 4, 4), bars, (1.0, 5.0), "epsilon"))

model = checker.Checker()
learn(model, sum(logits.square().mean() for logits in model(torch.randn(2, 3, 128, 128))))

checker.train(Path("run"), checker.Recipe(pictures=32, held_out=32, steps=1))  # and one loop as a whole
assert Path("run/checker/checker.safetensors").stat().st_size > 1_000_000
"""


def test_the_whole_road_runs_without_diffusers_and_transformers(models, tmp_path):
    """Load, every sampler, the VAE both ways, scenes, and the commands that draw."""
    assert python(BLOCK + ROAD + NOTHING_CAME_IN, models.folder("sd1"), cwd=tmp_path).endswith("done\n")
    assert (tmp_path / "picture.png").stat().st_size > 100


def test_every_trainer_s_loss_takes_a_step_without_diffusers_and_transformers(tmp_path):
    assert python(BLOCK + LEARN + NOTHING_CAME_IN, cwd=tmp_path) == "done\n"


EXPORT = """
from pathlib import Path
import ldm
from ldm.models.unet import UNet
from ldm.models.vae import VAE
from ldm.metrics.checker import Checker
from ldm.io.folders import write_json
from ldm.io.weights import save_weights
from ldm.train import clip, unet, vae
from ldm.train.common import write_model
from ldm.train.export import export
from ldm.train.vocabulary import save_vocabulary, train_vocabulary

save_vocabulary(Path("run/tokenizer"), *train_vocabulary(["a red house", "snow at night"], 530))
tokenizer = ldm.Tokenizer.from_folder("run/tokenizer")
towers = clip.CLIP(clip.text_config(tokenizer), clip.VISION)
for name, tower in (("text", towers.text), ("vision", towers.vision)):
    write_model(Path("run/clip", name), tower, "model")
write_model(Path("run/vae"), VAE(vae.CONFIG), "diffusion_pytorch_model")
write_model(Path("run/unet/unet"), UNet(unet.CONFIG), "diffusion_pytorch_model")
write_model(Path("run/unet/text"), towers.text, "model")
write_json(Path("run/unet/trained-with.json"), {})
save_weights({"logit_scale": towers.logit_scale.detach()}, Path("run/clip/logit_scale.safetensors"))
Path("run/checker").mkdir()
save_weights(Checker().state_dict(), Path("run/checker/checker.safetensors"))
export(Path("run"), Path("weights"), {"steps": 2, "guidance": 2.0, "sampler": "ddim"})
assert ldm.load("weights")("a house").images[0].size == (128, 128)
"""


def test_a_model_is_exported_without_diffusers_and_transformers(tmp_path):
    assert python(BLOCK + EXPORT + NOTHING_CAME_IN, cwd=tmp_path).endswith("done\n")


# ------------------------------------------------------------------------------------ directions of import


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in PACKAGE.rglob("*.py")}


def imported(name, everything=False):
    """What a module imports: names of ours, or the first words of all. Imports inside functions count; those for
    annotations alone (`if TYPE_CHECKING`) don't."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    ignored = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            ignored |= {id(inner) for inner in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in ignored:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = name if MODULES[name].stem == "__init__" else name.rpartition(".")[0]
            base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
            source = (base + (node.module or "")).strip(".")
            modules = {f"{source}.{alias.name}" for alias in node.names} & MODULES.keys()
            found |= modules if len(modules) == len(node.names) else modules | {source}
    return {each.partition(".")[0] for each in found} if everything else found & MODULES.keys()


def below(*names):
    return {m for m in MODULES if any(m == n or m.startswith(n + ".") for n in names)}


ALGEBRA = ("ldm.errors", "ldm.config", "ldm.diffusion")
MAY_IMPORT = {  # the folders follow the road: each station knows those before it at most
    "ldm.errors": (),
    "ldm.config": ("ldm.errors",),
    "ldm.diffusion": ("ldm.errors",),
    "ldm.noise": ("ldm.errors",),
    "ldm.schedules": (*ALGEBRA, "ldm.schedules"),
    "ldm.sampling": (*ALGEBRA, "ldm.noise", "ldm.schedules"),
    "ldm.samplers": (*ALGEBRA, "ldm.noise", "ldm.schedules", "ldm.sampling", "ldm.samplers"),
    "ldm.settings": (
        *ALGEBRA,
        "ldm.noise",
        "ldm.schedules",
        "ldm.sampling",
        "ldm.samplers",
        "ldm.flux",
        "ldm.sizes",
        "ldm.text.prompts",
    ),
    "ldm.flux": (*ALGEBRA, "ldm.schedules"),
    "ldm.models": ("ldm.errors", "ldm.config", "ldm.models"),
    "ldm.text": ("ldm.errors", "ldm.config", "ldm.io", "ldm.text"),
    "ldm.io": ("ldm.errors", "ldm.io"),
    "ldm.hub": ("ldm.errors", "ldm.io", "ldm.hub"),
    "ldm.checkpoints": (
        *ALGEBRA,
        "ldm.checkpoints",
        "ldm.hub",
        "ldm.io",
        "ldm.models",
        "ldm.noise",
        "ldm.schedules",
        "ldm.settings",
        "ldm.tasks",
        "ldm.text",
    ),
    "ldm.lora": (
        "ldm.errors",
        "ldm.config",
        "ldm.checkpoints",
        "ldm.io",
        "ldm.lora",
        "ldm.memory",
        "ldm.models",
        "ldm.text",
    ),
    "ldm.scenes": ("ldm.errors", "ldm.scenes"),
    "ldm.guidance": (*ALGEBRA, "ldm.models", "ldm.schedules"),
    "ldm.tiles": (*ALGEBRA, "ldm.guidance", "ldm.schedules"),
    "ldm.pictures": ("ldm.errors", "ldm.io"),
    "ldm.conditions": ("ldm.errors", "ldm.io", "ldm.conditions"),
    "ldm.control": (
        "ldm.errors",
        "ldm.conditions",
        "ldm.guidance",
        "ldm.io",
        "ldm.models",
        "ldm.pictures",
        "ldm.schedules",
    ),
    "ldm.sizes": ("ldm.errors",),
    "ldm.memory": ("ldm.errors", "ldm.config", "ldm.io", "ldm.models", "ldm.text"),
    "ldm.precision": ("ldm.errors", "ldm.guidance", "ldm.models", "ldm.schedules"),
    "ldm.network": (
        *ALGEBRA,
        "ldm.control",
        "ldm.flux",
        "ldm.guidance",
        "ldm.models",
        "ldm.schedules",
        "ldm.sizes",
        "ldm.text",
        "ldm.tiles",
    ),
    "ldm.tasks": (
        *ALGEBRA,
        "ldm.conditions",
        "ldm.io",
        "ldm.models",
        "ldm.noise",
        "ldm.pictures",
        "ldm.precision",
        "ldm.sampling",
        "ldm.schedules",
        "ldm.settings",
    ),
}
# The two places that may import diffusers and transformers, inside functions.
OF_THE_REFERENCE = {"ldm.parity.reference", "ldm.conditions.depth"}
LIBRARIES = {"diffusers", "transformers", "accelerate", "peft", "compel"}


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_a_station_knows_only_those_before_it(name):
    assert below(name)
    for module in below(name):
        assert imported(module) <= below(*MAY_IMPORT[name]), module


def test_only_the_command_line_knows_the_command_line():
    assert len(below("ldm.cli")) > 1
    for module in MODULES.keys() - below("ldm.cli", "ldm.__main__"):
        assert not imported(module) & below("ldm.cli"), module


def test_nothing_that_draws_knows_how_it_was_trained_or_measured():
    for module in MODULES.keys() - below("ldm.cli", "ldm.__main__", "ldm.train", "ldm.metrics", "ldm.lab"):
        assert not imported(module) & below("ldm.train", "ldm.metrics"), module


def test_the_laboratory_knows_all_but_training_and_the_command_line_and_none_knows_it():
    """But `Pipeline.trace`, which goes there when it is called."""
    assert {"ldm.lab.watch", "ldm.lab.trace"} <= below("ldm.lab")
    for module in below("ldm.lab"):
        assert not imported(module) & below("ldm.train", "ldm.cli", "ldm.__main__"), module
    for module in MODULES.keys() - below("ldm.lab", "ldm.cli", "ldm.__main__"):
        known = {"ldm.lab.trace"} if module == "ldm.pipeline" else set()
        assert imported(module) & below("ldm.lab") == known, module


def test_there_are_no_cycles():
    """Neither at import time nor on use. `import ldm` itself stands for what `ldm.load` leads to."""
    done, road = set(), []

    def visit(name):
        assert name not in road, " -> ".join([*road[road.index(name) :], name])
        if name not in done:
            road.append(name)
            for other in sorted(imported(name) - {name}):
                visit(other)
            done.add(road.pop())

    for name in sorted(MODULES):
        visit(name)
    assert done == MODULES.keys()


def test_the_reference_is_imported_nowhere_else():
    assert OF_THE_REFERENCE < MODULES.keys()
    for module in MODULES.keys() - OF_THE_REFERENCE:
        assert not imported(module, everything=True) & LIBRARIES, module


@pytest.mark.parametrize("module", sorted(OF_THE_REFERENCE))
def test_the_reference_is_imported_on_use_alone(module, tmp_path):
    """Those two modules themselves can be imported where there is no reference."""
    assert python(f"{BLOCK}\nimport {module}\n{NOTHING_CAME_IN}", cwd=tmp_path) == "done\n"


def test_the_import_parser_sees_what_it_should():
    assert {"ldm.samplers", "ldm.sampling", "ldm.text.words"} <= imported("ldm.pipeline")
    assert {"torch", "ldm", "PIL"} <= imported("ldm.pipeline", everything=True)
    assert "ldm.scenes.world" in imported("ldm.scenes")  # relative imports
