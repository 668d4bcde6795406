"""The stages a pipeline is made of. A stage never imports a model; what differs between models is data or a part."""
