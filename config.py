"""Where everything is. This is the one file to edit: it holds plain assignments and no code.

Relative paths are relative to this file. To keep several configurations, copy this file and set the environment variable
DNCBM_CONFIG to the path of the copy. docs/DATA.md describes every form that an entry may take.
"""

# The five roots. A stage creates a folder when it first writes to it; the folder above it must exist.
data_dir = "data"  # image features, labels and splits
sae_dir = "SAE"  # sparse autoencoders and the names of their latents
probe_dir = "probe"  # concept strengths, linear probes, probe_results.csv
vocab_dir = "vocab"  # <vocabulary>.txt, one word per line, and its text embeddings
analysis_dir = "analysis"  # explanations, figures and tables

# The vocabulary that names the latents: vocab_dir/<vocabulary>.txt
vocabulary = "clipdissect_20k"

# Images that the SAE is trained on: the webdataset shards of each split. train_val is held out of the training shards, for
# validation. These are the paper's shard numbers; yours may differ (list the folders that img2dataset wrote). A folder of
# images at any depth works too: "mine": "photos". A split may also be a list of patterns, with globs, URLs and commands.
sae_datasets = {
    "cc3m": {
        "train": "datasets/cc3m/training/{00000..00299}.tar",
        "train_val": "datasets/cc3m/training/{00300..00331}.tar",
        "val": "datasets/cc3m/validation/{00000..00001}.tar",
    },
    # CC3M as others have packed it, for those who cannot download it any more: --sae_dataset cc3m_wds. Shards are read from
    # the hub; of a downloaded copy, write the folder in place of the address.
    # "cc3m_wds": {
    #     "train": "https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-train-{0000..0519}.tar",
    #     "train_val": "https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-train-{0520..0575}.tar",
    #     "val": "https://huggingface.co/datasets/pixparse/cc3m-wds/resolve/main/cc3m-validation-{0000..0015}.tar",
    # },
}

# Images that the linear probe classifies. places365, cifar10, cifar100 and waterbirds100 are read as published; for any
# other name, the folder holds train/<class>/<image> and val/<class>/<image> (as ImageNet does). To read a folder under
# another name, or with other splits: "copy": {"path": "datasets/copy", "reader": "cifar10"}; see docs/DATA.md. With
# "license": "CC BY 4.0, A. Photographer", pages that show the images say under which licence, and whom to credit.
probe_datasets = {
    "places365": "datasets/places365",
    "imagenet": "datasets/imagenet",
    "cifar10": "datasets/cifar10",
    "cifar100": "datasets/cifar100",
    "waterbirds100": "datasets/waterbirds100",
}

# Image encoders: (open_clip model, pretrained tag or checkpoint file), or "local-dir:FOLDER" for an open_clip folder.
# OpenAI's weights belong to the -quickgelu models.
encoders = {
    "clip_RN50": ("RN50-quickgelu", "openai"),
    "clip_ViT-B/16": ("ViT-B-16-quickgelu", "openai"),
    "clip_ViT-L/14": ("ViT-L-14-quickgelu", "openai"),
}

# Flags that you would otherwise repeat on every command, for example {"img_enc_name": "clip_ViT-B/16", "device": "cuda"}.
# A flag on the command line wins.
defaults = {}
