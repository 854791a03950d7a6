"""The demo: emoji, and a small CLIP made for them. `build.py` makes the files that are named here.

config.py at the top of the repository explains every key.
"""

data_dir = "run/data"
sae_dir = "run/SAE"
probe_dir = "run/probe"
vocab_dir = "run/vocab"
analysis_dir = "run/analysis"

vocabulary = "openmoji_nouns"

sae_datasets = {
    "openmoji": {
        "train": "run/webdataset/training/{00000..00004}.tar",
        "train_val": "run/webdataset/training/00005.tar",
        "val": "run/webdataset/validation/00000.tar",
    }
}

_license = "OpenMoji, CC BY-SA 4.0, https://openmoji.org"
probe_datasets = {
    "openmoji_categories": {"path": "run/categories", "license": _license},
    "openmoji_outlines": {"path": "run/outlines", "license": _license},
    "openmoji_backgrounds": {
        "path": "run/backgrounds",
        "reader": "waterbirds100",
        "splits": {"train": "0", "train_val": "1", "val": "2"},  # train_val has other emoji than train
        "license": _license,
    },
}

encoders = {"openmoji_clip": "local-dir:run/clip"}

# Settings for 1,500 images instead of three million.
defaults = {
    "img_enc_name": "openmoji_clip",
    "sae_dataset": "openmoji",
    "probe_dataset": "openmoji_categories",
    "input_transform": "unit_norm",
    "expansion_factor": 1,
    "lr": 1e-3,
    "l1_coeff": 5e-4,
    "num_epochs": 300,
    "train_sae_bs": 64,
    "templates": ["an emoji of {}", "a drawing of {}", "{}"],
}
