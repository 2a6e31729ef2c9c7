def main(check: bool) -> int:
    return 0
