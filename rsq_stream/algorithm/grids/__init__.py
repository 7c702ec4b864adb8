"""What codes stand for, one file a grid."""
