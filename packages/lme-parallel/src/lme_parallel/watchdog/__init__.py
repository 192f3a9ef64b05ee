"""Who holds up a run of several processes: found out, said in one sentence, ended."""
