"""Pictures and videos: to files and back, in from people, out to storage."""
