"""Arguments of a command line. A wrong one is answered in one line."""
import argparse


class Parser(argparse.ArgumentParser):
    def __init__(self, description: str):
        formatter = argparse.RawDescriptionHelpFormatter
        super().__init__(description=description, formatter_class=formatter)

    def error(self, message: str):
        self.exit(2, f"error: {message}; --help lists every option\n")


def whole(text: str, least: int = 0) -> int:
    whole_number = text.isascii() and text.isdecimal() and len(text) <= 10
    if not whole_number or not least <= int(text) <= 10**9:
        raise argparse.ArgumentTypeError(
            f"{text[:20]!r} is not a whole number from {least} to 10^9")
    return int(text)


def positive(text: str) -> int:
    return whole(text, 1)


def layers(text: str) -> list[int]:
    try:
        return [whole(part) for part in text.split(",")]
    except argparse.ArgumentTypeError:
        message = f"{text!r} is not a list of 0-based layers such as 1,3,5"
        raise argparse.ArgumentTypeError(message) from None


def seeds(text: str) -> list[int]:
    numbers = [whole(part) for part in text.split(",")]
    if len(set(numbers)) < len(numbers):
        raise argparse.ArgumentTypeError(f"{text!r} names a seed twice")
    return numbers
