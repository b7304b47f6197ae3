"""What several tests share: small pipelines, processes, recorders, servers."""
