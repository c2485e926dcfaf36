# Instances that join by their user data. The provider is an example; what matters is user_data.
#   TF_VAR_tombolo_token=$(tombolo token create -n shop --workload-group catalog --ttl 30m --uses 3) terraform apply

variable "tombolo_token" {
  description = "Join token; its uses must be enough for all instances."
  type        = string
  sensitive   = true
}

variable "tombolo_repository" {
  description = "Host and path of the package repository, without https://"
  type        = string
}

locals {
  user_data = replace(
    replace(file("${path.module}/../cloud-init/user-data.yaml"), "@TOKEN@", var.tombolo_token),
    "REPOSITORY", var.tombolo_repository,
  )
}

resource "aws_instance" "catalog" {
  count         = 3
  ami           = "ami-of-debian-12"
  instance_type = "t3.small"
  user_data     = local.user_data

  metadata_options {
    # Otherwise every local user reads the user data, and with it the token until it is used up.
    http_tokens   = "required"
    http_endpoint = "enabled"
  }

  lifecycle {
    # A token that has been used is no reason to make the instance again.
    ignore_changes = [user_data]
  }
}
