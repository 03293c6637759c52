"""The work folder: stage folders with their manifests, and the status of all stages."""
