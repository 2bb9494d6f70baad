"""The command line, a file per command.

Imports all other rooms; none imports it.
"""
