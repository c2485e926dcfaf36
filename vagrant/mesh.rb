# What needs more than one machine: tokens, and the smoke test. Called by triggers of the Vagrantfile.
module Mesh
  DOMAIN = "shop.svc.mesh.internal"
  # A call, and how often and how long it is tried: an emulated processor needs its time.
  CALL = "curl -sS -m 20"
  class Failed < Vagrant::Errors::VagrantError
    def initialize(message)
      @text = message
      super()
    end

    def error_message
      @text
    end
  end

  module_function

  # Runs a command line as root. It goes to the shell by ssh's standard input, not in an argument that others could read.
  def try(machine, line)
    said = { stdout: +"", stderr: +"" }
    code = machine.communicate.sudo(line, error_check: false) { |stream, data| said[stream] << data }
    [code.zero?, said[:stdout].strip, said[:stderr].strip]
  end

  def run(machine, line)
    good, out, error = try(machine, line)
    raise Failed, "#{machine.name}: #{line.lines.first.strip}\n#{out}\n#{error}" unless good

    out
  end

  # Enrols the machine; nothing is done where it is a member already.
  def join(env, machine, group)
    if try(machine, "test -e /var/lib/tombolo/agent/registration.json").first
      run(machine, "systemctl start tombolo-agent")
      return machine.ui.success("is a member already")
    end
    control = env.machine(:control, machine.provider_name)
    token = run(control, "tombolo token create -n shop --workload-group #{group} --ttl 10m")
    machine.ui.info("tombolo up, with a token of one use for #{group}")
    said = run(machine, "tombolo up - <<'TOKEN'\n#{token}\nTOKEN")
    said.each_line { |line| machine.ui.detail(line.chomp) }
  end

  def smoke_test(env, last, members)
    machines = members.to_h { |name, _| [name, env.machine(name.to_sym, last.provider_name)] }
    control = env.machine(:control, last.provider_name)
    ui = env.ui
    ui.info("smoke test")
    passed = lambda { |text| ui.success("  ok   #{text}") }

    machines.each do |name, machine|
      out = run(machine, "tombolo status")
      words = out.lines.grep(/^(State|Identity):/).map { |line| line.split(":", 2).last.strip }
      passed.call("#{name}: #{words.join(', ')}")
    end
    machines.each do |from, machine|
      members.each do |to, group|
        next if from == to

        expect(machine, "#{CALL} http://#{group}.#{DOMAIN}/", to)
        passed.call("#{from} calls http://#{group}.#{DOMAIN} and #{to} answers")
      end
    end
    deny(control, machines, members, passed)
    ui.success("the mesh works: vagrant ssh #{members.keys.first}, then curl http://#{members.values.last}.#{DOMAIN}")
  end

  # A policy cuts the first member off from the last one, and from nobody else.
  def deny(control, machines, members, passed)
    from, group = members.first
    to, target = members.to_a.last
    url = "http://#{target}.#{DOMAIN}/"
    begin
      run(control, "tombolo apply -f - <<'YAML'\n#{policy(group, target)}YAML")
      eventually("#{from} is refused") { !try(machines[from], "#{CALL} #{url}").first }
      passed.call("with an AuthorizationPolicy #{from} is refused by #{to}")
      _, why = try(machines[from], "tombolo why #{target}.#{DOMAIN}:80")
      raise Failed, "why does not name the policy:\n#{why}" unless why.include?("smoke-test")

      passed.call("tombolo why: #{why.lines.grep(/smoke-test/).first.strip}")
    ensure
      try(control, "tombolo delete authorizationpolicy smoke-test -n shop")
    end
    expect(machines[from], "#{CALL} #{url}", to)
    passed.call("without it #{from} is answered again")
  end

  def policy(group, target)
    <<~YAML
      apiVersion: security.istio.io/v1
      kind: AuthorizationPolicy
      metadata: {name: smoke-test, namespace: shop}
      spec:
        action: DENY
        selector: {matchLabels: {app: #{target}}}
        rules:
        - from:
          - source: {principals: [mesh.example/ns/shop/sa/#{group}]}
    YAML
  end

  def expect(machine, line, answer)
    got = nil
    eventually("#{answer} answers (#{line})", -> { got }) { (got = try(machine, line)).first(2) == [true, answer] }
  end

  def eventually(what, detail = -> {})
    30.times do
      return if yield

      sleep 1
    end
    raise Failed, "not seen: #{what} #{detail.call}"
  end
end
