"""What has to be set for the same bytes to come out twice."""
