"""Where images come from: folders, lists, tables, shards, arrays."""
