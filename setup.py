"""Editable installation of the engine: `pip install -e .[dev,data,logs,eval,serve] -c constraints.txt`."""

from setuptools import find_packages, setup

ROOMS = ["kernels", "model", "engine", "rlhf", "evals"]

CORE = [
    "torch>=2.11",
    "triton>=3.6; platform_system == 'Linux'",
    "numpy",
    "safetensors",
    "sentencepiece",
    "protobuf",  # how sentencepiece models are stored
    "tokenizers",
    "jsonargparse[signatures]",
    "PyYAML",
    "jinja2>=3.1.6",  # chat templates; older sandboxes have holes
]

EXTRAS = {
    "flash": ["flash-attn"],
    "data": ["pyarrow", "zstandard"],
    "logs": ["tensorboard", "matplotlib"],
    "wandb": ["wandb"],
    "eval": ["sacrebleu", "rouge-score"],
    "serve": ["fastapi", "uvicorn"],
    "dev": [
        "pytest",
        "pytest-xdist",
        "hypothesis",
        "ruff",
        "mypy",
        "transformers",
        "peft",
        "openai",
        "playwright",
        "schemathesis",
        "types-PyYAML",
    ],
}

setup(
    name="chimed-engine",
    version="0.1.0",
    description="From raw Chinese medical text to an aligned, evaluated medical language model",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={"engine.serving": ["*.html"], "evals": ["*.yaml", "*.jinja", "*.css"]},
    install_requires=CORE,
    extras_require=EXTRAS,
)
