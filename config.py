"""Where things are. This is the one file to edit: plain assignments, no code.

Relative paths are relative to this file. To keep several configurations, copy this file and name the copy in the
environment variable DNCBM_CONFIG.
"""

# The five roots. Folders are made when a stage first writes to them.
data_dir = "data"  # image features, labels and splits
sae_dir = "SAE"  # sparse autoencoders and the names of their latents
probe_dir = "probe"  # concept strengths, linear probes, probe_results.csv
vocab_dir = "vocab"  # <vocabulary>.txt, one word a line, and its text embeddings
analysis_dir = "analysis"  # explanations, figures and summaries

# The vocabulary that names the latents: vocab_dir/<vocabulary>.txt
vocabulary = "clipdissect_20k"

# Images the SAE is trained on: webdataset shards of each split. Your shard numbers may differ from the paper's (below):
# `ls` the folders that img2dataset wrote. train_val is held out of the training shards for validation.
# Or a folder of images, at any depth, divided at random or by its folders train, train_val and val: "mine": "photos".
sae_datasets = {
    "cc3m": {
        "train": "datasets/cc3m/training/{00000..00299}.tar",
        "train_val": "datasets/cc3m/training/{00300..00331}.tar",
        "val": "datasets/cc3m/validation/{00000..00001}.tar",
    },
}

# Images the linear probe classifies. places365, cifar10, cifar100 and waterbirds100 are read as published; every other
# name is a folder train/<class>/<image> and val/<class>/<image> (ImageNet is one).
probe_datasets = {
    "places365": "datasets/places365",
    "imagenet": "datasets/imagenet",
    "cifar10": "datasets/cifar10",
    "cifar100": "datasets/cifar100",
    "waterbirds100": "datasets/waterbirds100",
}

# Image encoders: (open_clip model, pretrained tag or checkpoint file), or "local-dir:FOLDER" for an open_clip folder.
# OpenAI's weights are made for the -quickgelu models.
encoders = {
    "clip_RN50": ("RN50-quickgelu", "openai"),
    "clip_ViT-B/16": ("ViT-B-16-quickgelu", "openai"),
    "clip_ViT-L/14": ("ViT-L-14-quickgelu", "openai"),
}

# Flags you would otherwise repeat on every command, for example {"img_enc_name": "clip_ViT-B/16", "device": "cuda"}.
# A flag given on the command line wins.
defaults = {}
