"""Arguments of a command line. A wrong one is answered in one line."""
import argparse


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def whole(text: str, least: int = 0) -> int:
    if not (text.isascii() and text.isdecimal() and least <= int(text[:11]) <= 10**9):
        raise argparse.ArgumentTypeError(f"{text[:20]!r} is no whole number from {least} to 10^9")
    return int(text)


def positive(text: str) -> int:
    return whole(text, least=1)


def numbers(text: str) -> list[int]:
    """0,2,5: seeds, or 0-based layers; each once."""
    found = [whole(part) for part in text.split(",")]
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names a number twice")
    return found
