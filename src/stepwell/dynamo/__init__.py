"""Workers for NVIDIA Dynamo. Only `adapter` imports Dynamo itself, which is installed apart (`make setup-dynamo`)."""
