"""Where people already are: codeact's parts inside other people's trainers and harnesses."""
