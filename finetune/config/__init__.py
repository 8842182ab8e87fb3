"""What does a run say? The schema of its YAML file, its loading, and messages about what is wrong."""
