"""Subcommands of ``mom-compile``: each module has ``add_arguments(parser)`` and ``run(args) -> int``."""
