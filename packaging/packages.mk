# Included by the Makefile.
#   make packages   deb and rpm packages of the release build, in target/packages
#   make repo       the same as signed apt and yum repositories, in target/repo (SIGNING_KEY=ID of your gpg key)
.PHONY: packages packages-setup repo
packages-setup:
	@./packaging/setup.sh

packages: build packages-setup
	@./packaging/build.sh
	@./packaging/arm64.sh

repo: packages
	@TOMBOLO_SIGNING_KEY="$(SIGNING_KEY)" ./packaging/repo.sh
