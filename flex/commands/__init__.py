"""The subcommands of ``flex-moe``, one small module each.

A module has ``HELP`` (one line), ``add_arguments(parser)`` and ``run(arguments) -> exit code``. At import it
needs the standard library alone: torch and transformers are imported when a command runs, so that ``--help``
is instant.
"""
