"""The commands of `bapq`, a file for each or for those that belong together.

A file's `add` functions take the parser's subcommands and add theirs; the command's function takes
the parsed arguments, prints its result, and raises a BapqError when it fails.
"""
