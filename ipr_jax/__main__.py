"""The command ``ipr-jax``, also as ``python -m ipr_jax``."""

from ipr_jax.interrupts import watch


def main() -> None:
    """Run the command line, whose import takes a second; Ctrl-C is answered before."""
    watch()
    from ipr_jax.cli import main as cli

    cli.main()


if __name__ == "__main__":
    main()
