"""Stage 3: text embeddings of the words that may name a latent."""

from dncbm import arguments, vocabulary


def main() -> None:
    settings, args = arguments.parse(__doc__)
    vocabulary.save_vocabulary_embeddings(settings, args.img_enc_name, device=args.device, overwrite=args.overwrite)


if __name__ == "__main__":
    arguments.run(main)
