"""From a request on the wire to pictures: validation, preprocessing, the order of engine calls, postprocessing."""
