"""How ranks talk: the only collectives, groups of hosts, timeouts that name who is missing, errors that wait."""
