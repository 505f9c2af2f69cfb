"""What every test relies on: no network, and one thread, with which tiny models are fastest and sums keep their order.

Set before torch and the Hugging Face libraries are imported; a value that the caller has set stands.
"""

import os

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
}.items():
    os.environ.setdefault(name, value)

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Tiny Stable Diffusion folders, and both sides' pipelines of them (`tiny_pairs.Models`)."""
    from tiny_pairs import Models  # not before it is asked for: it imports diffusers and transformers

    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def task_models(tmp_path_factory, models):
    """The same for every task: other channels beside the latent (`tiny_tasks.TaskModels`)."""
    from tiny_tasks import TaskModels

    return TaskModels(tmp_path_factory.mktemp("tasks"), models)
