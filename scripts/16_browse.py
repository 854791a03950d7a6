"""Write the browser of a run: a folder of pages that shows its concepts, classes and images, and opens anywhere."""

from dncbm.cli import main

if __name__ == "__main__":
    main("browse")
