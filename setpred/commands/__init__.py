"""The command lines: the only parsers of arguments, the only exit statuses."""
