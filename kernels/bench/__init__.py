"""The ops on a GPU: how long they take, against what the machine can do at all, and against their peers."""
